"""Paged key/value tensors, which a back end allocates. Block 0 is the null block of padding; the caller decides which of the
others belongs to whom."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ladimo.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class KVCache:
    # [L, num_blocks, block_size, num_key_value_heads, head_dim]. The compiled CPU step has its own order within a block.
    k: Tensor
    v: Tensor  # the same

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
        return per_token * block_size

    def read(self, layer: int, block_table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of sequences with block table [B, N], each [B, N * block_size, H_kv, C]."""
        return self.k[layer][block_table].flatten(1, 2), self.v[layer][block_table].flatten(1, 2)
