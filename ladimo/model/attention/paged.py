"""Attention in torch, over whole sequences or over the paged cache: the reference for all back ends.

Queries and keys have C channels here, or fewer where they are pruned. Values and outputs always have C.

Legend: T tokens, H query heads, G key/value heads, C head_dim, R rotary_dim, B sequences, N blocks per sequence, S positions.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to the first R channels of x [T, H, C]; cos and sin are [T, 1, R].

    Channel i forms a pair with channel i + R / 2, as in Hugging Face's models.
    """
    turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def attend_whole(q: Tensor, k: Tensor, v: Tensor, num_sequences: int) -> Tensor:
    """Causal attention within each of `num_sequences` sequences of equal length. q [T, H, C], k and v [T, G, C] -> [T, H,
    C]."""
    q, k, v = (x.view(num_sequences, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # [B, heads, S, C]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def rotate_and_store(
    q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """Rotate q [T, H, C] and k [T, G, C], and store k and v [T, G, C] in one layer's cache. Returns the rotated q.

    The caches are [num_blocks, block_size, G, C]. slot_mapping [T] says where to store: block * block_size + offset.
    """
    store(apply_rope(k, *rope), v, k_cache, v_cache, slot_mapping)
    return apply_rope(q, *rope)


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store rotated keys and values [T, G, C] in one layer's cache; see `rotate_and_store`."""
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)


def attend_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_lens: Tensor) -> Tensor:
    """Attention with one query per sequence, q [B, H, C] -> [B, H, C].

    The caches of the layer are [num_blocks, block_size, G, C]. block_table [B, N] lists the blocks of each sequence. Its first
    context_lens [B] positions are visible.
    """
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
    """Causal attention for the last T positions of one sequence of S. q [T, H, C], k and v [S, G, C] -> [T, H, C]."""
    length, context = q.shape[0], k.shape[0]
    mask = None
    if length < context:  # a later chunk of a prompt: query i sees the first context - length + i + 1 keys
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
