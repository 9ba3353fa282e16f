"""Grouped-query attention over the paged cache, or over whole sequences when there is none.

Legend: T tokens, D hidden_size, H query heads, G key/value heads, C head_dim, B sequences, S positions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.model import kernels
from ladimo.model.config import ModelConfig
from ladimo.model.inputs import StepInputs
from ladimo.model.kv_cache import KVCache
from ladimo.model.layers import apply_rope


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        heads, kv_heads, bias = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self, hidden_states: Tensor, rope: tuple[Tensor, Tensor], inputs: StepInputs, kv_cache: KVCache | None
    ) -> Tensor:
        """Hidden states [T, D] -> [T, D]."""
        q = self.q_proj(hidden_states).view(-1, self.num_heads, self.head_dim)
        k = self.k_proj(hidden_states).view(-1, self.num_kv_heads, self.head_dim)
        v = self.v_proj(hidden_states).view(-1, self.num_kv_heads, self.head_dim)
        if kv_cache is None:
            out = attend_whole(apply_rope(q, *rope), apply_rope(k, *rope), v, inputs.num_sequences)
        else:
            assert inputs.slot_mapping is not None
            q = rotate_and_store(q, k, v, rope, kv_cache.k[self.layer], kv_cache.v[self.layer], inputs.slot_mapping)
            out = attend_paged(q, inputs, kv_cache, self.layer)
        projected: Tensor = self.o_proj(out.reshape(-1, self.num_heads * self.head_dim))
        return projected


def attend_whole(q: Tensor, k: Tensor, v: Tensor, num_sequences: int) -> Tensor:
    """Causal attention inside each of `num_sequences` equally long sequences: q [T, H, C], k and v [T, G, C] -> [T, H, C]."""
    q, k, v = (x.view(num_sequences, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # [B, heads, S, C]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def rotate_and_store(
    q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """Rotate q [T, H, C] and k [T, G, C]; store k and v [T, G, C] in one layer's cache [num_blocks, block_size, G, C] at slots
    [T] (= block * block_size + offset). Returns the rotated q."""
    if kernels.available(q, k_cache):
        from ladimo.model.kernels import attention

        return attention.rotate_and_store(q, k, v, rope, k_cache, v_cache, slot_mapping)
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, apply_rope(k, *rope))
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)
    return apply_rope(q, *rope)


def attend_paged(q: Tensor, inputs: StepInputs, kv_cache: KVCache, layer: int) -> Tensor:
    """Attention of one step: decoding rows in one batch, prefill segments one by one. q [T, H, C] -> [T, H, C]."""
    assert inputs.block_table is not None and inputs.context_lens is not None
    parts = []
    if inputs.num_decode:
        rows = inputs.num_decode
        k_cache, v_cache = kv_cache.k[layer], kv_cache.v[layer]
        parts.append(attend_decode(q[:rows], k_cache, v_cache, inputs.block_table[:rows], inputs.context_lens[:rows]))
    for segment in inputs.prefill:
        block_size = kv_cache.k.shape[2]
        num_blocks = -(-segment.context_len // block_size)
        k, v = kv_cache.read(layer, inputs.block_table[segment.row : segment.row + 1, :num_blocks])
        queries = q[segment.start : segment.start + segment.length]
        parts.append(attend_prefill(queries, k[0, : segment.context_len], v[0, : segment.context_len]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_lens: Tensor) -> Tensor:
    """One query per sequence: q [B, H, C] over one layer's cache [num_blocks, block_size, G, C], read through block_table
    [B, N]; the first context_lens [B] places count."""
    if kernels.available(q, k_cache):
        from ladimo.model.kernels import attention

        return attention.attend_decode(q, k_cache, v_cache, block_table, context_lens)
    k, v = k_cache[block_table].flatten(1, 2), v_cache[block_table].flatten(1, 2)
    visible = torch.arange(k.shape[1], device=q.device)[None] < context_lens[:, None]  # [B, S]
    out = F.scaled_dot_product_attention(
        q[:, :, None],
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible[:, None, None],
        enable_gqa=k.shape[2] != q.shape[1],
    )
    return out.squeeze(2)


def attend_prefill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last q.shape[0] positions of one sequence attend to all before them: q [T, H, C], k and v [S, G, C]."""
    length, context = q.shape[0], k.shape[0]
    mask = None
    if length < context:  # a later chunk: query i sees the first context - length + i + 1 keys
        position = torch.arange(context, device=q.device)
        mask = position[None] <= position[context - length :, None]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=k.shape[1] != q.shape[1],
    )
    return out[0].transpose(0, 1)
