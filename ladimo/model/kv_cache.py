"""Paged key/value tensors. Which block belongs to whom is the caller's business; block 0 is the null block of padding."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ladimo.model.config import ModelConfig
from ladimo.model.cpu.arena import huge_zeros


@dataclass(frozen=True, slots=True)
class KVCache:
    k: Tensor  # [L, num_blocks, block_size, num_key_value_heads, head_dim]
    v: Tensor  # the same

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> "KVCache":
        shape = (config.num_hidden_layers, num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        if torch.device(device).type == "cpu":
            return cls(*(huge_zeros(math.prod(shape), dtype).view(shape) for _ in range(2)))
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
        return per_token * block_size

    def read(self, layer: int, block_table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of sequences with block table [B, N], each [B, N * block_size, H_kv, C]."""
        return self.k[layer][block_table].flatten(1, 2), self.v[layer][block_table].flatten(1, 2)
