"""The paged KV cache, which a back end allocates. Block 0 is the null block for padding. The caller assigns all other blocks.

Legend: L layers, G key/value heads, C head_dim (of keys: qk_head_dim), B sequences, N blocks per sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ladimo.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of all blocks."""

    # [L, num_blocks, block_size, G, C]. The native back end orders the numbers within a block in its own way.
    k: Tensor
    v: Tensor  # same shape, unless keys are pruned

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block: keys and values of `block_size` tokens in all layers."""
        channels = config.qk_head_dim + config.head_dim
        per_token = config.num_hidden_layers * config.num_key_value_heads * channels * dtype.itemsize
        return per_token * block_size

    def read(self, layer: int, block_table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the sequences in block table [B, N], each [B, N * block_size, G, C]. Not for the native back
        end."""
        return self.k[layer][block_table].flatten(1, 2), self.v[layer][block_table].flatten(1, 2)
