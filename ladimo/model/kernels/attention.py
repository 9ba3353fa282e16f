"""Decode attention over the paged KV cache, and rotary embedding with the store of keys and values. References: the functions
of the same names in `ladimo.model.attention.paged`.

The time of decode attention is the time to read keys and values. So the context of each sequence is divided into parts that run
in parallel (flash-decoding). A second kernel joins the parts by their maxima and sums.

Legend: B sequences, H query heads, G key/value heads, R = H / G query heads per key/value head, C head_dim, N blocks per
sequence, S parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladimo.model.kernels.early_launch import early_launch, wait_for_inputs

# The number of programs to aim for: a few per multiprocessor of a large GPU.
PROGRAMS = 512
# Positions of the context per iteration.
POSITIONS = 64


def num_parts(batch: int, num_kv_heads: int, max_context: int, programs: int = PROGRAMS, positions: int = POSITIONS) -> int:
    """The number of parts of a context. It depends on shapes only, so a captured launch stays valid while contexts grow."""
    wanted = triton.cdiv(programs, batch * num_kv_heads)
    parts: int = triton.next_power_of_2(max(1, min(wanted, triton.cdiv(max_context, positions), 64)))
    return parts


def attend_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    programs: int = PROGRAMS,
    positions: int = POSITIONS,
) -> Tensor:
    """Attention with one query per sequence, q [B, H, C] -> [B, H, C]. See the reference."""
    batch, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = k_cache.shape
    per_group = heads // kv_heads
    parts = num_parts(batch, kv_heads, block_table.shape[1] * block_size, programs, positions)
    out = torch.empty(batch, heads, head_dim, dtype=q.dtype, device=q.device)
    # A single part writes `out`. Several parts write weighted sums of values, and the maximum and sum of the exponentials.
    sums = out if parts == 1 else torch.empty(batch, heads, parts, head_dim, dtype=torch.float32, device=q.device)
    stats = out if parts == 1 else torch.empty(batch, heads, parts, 2, dtype=torch.float32, device=q.device)
    sizes = {
        "H": heads,
        "C": head_dim,
        "PARTS": parts,
        "POSITIONS": positions,
        "BLOCK_C": max(16, triton.next_power_of_2(head_dim)),
    }
    _attend_part_kernel[(kv_heads, batch, parts)](
        q.contiguous(),
        k_cache,
        v_cache,
        block_table,
        context_lens,
        sums,
        stats,
        head_dim**-0.5 * 1.4426950408889634,  # exponentials to base 2
        block_table.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        **sizes,
        R=per_group,
        BLOCK_SIZE=block_size,
        BLOCK_R=max(16, triton.next_power_of_2(per_group)),  # a matrix product has at least 16 rows
        num_warps=4,
        num_stages=3,
        **early_launch(),
    )
    if parts > 1:
        _join_parts_kernel[(heads, batch)](sums, stats, context_lens, out, **sizes, **early_launch())
    return out


@triton.jit
def _part_length(context, PARTS: tl.constexpr, POSITIONS: tl.constexpr):
    """Positions per part: an equal share, rounded up to whole iterations. So short contexts have few parts."""
    share = (context + PARTS - 1) // PARTS
    return (share + POSITIONS - 1) // POSITIONS * POSITIONS


@triton.jit(do_not_specialize=["scale", "table_stride"])
def _attend_part_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    contexts_ptr,
    sums_ptr,
    stats_ptr,
    scale,
    table_stride,
    position_stride,
    group_stride,
    H: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    group = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    context = tl.load(contexts_ptr + row).to(tl.int32)
    length = _part_length(context, PARTS, POSITIONS)
    begin = part * length
    end = tl.minimum(begin + length, context)
    if (PARTS > 1) & (begin >= end):
        return

    heads = tl.arange(0, BLOCK_R)
    channels = tl.arange(0, BLOCK_C)
    is_head = heads < R
    is_channel = channels < C
    q_ptrs = q_ptr + (row * H + group * R + heads[:, None]) * C + channels[None, :]
    q = tl.load(q_ptrs, mask=is_head[:, None] & is_channel[None, :], other=0.0)
    highest = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for start in range(begin, end, POSITIONS):
        positions = start + tl.arange(0, POSITIONS)
        seen = positions < end
        block = tl.load(table_ptr + row * table_stride + positions // BLOCK_SIZE, mask=seen, other=0)
        slots = block.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        places = slots[:, None] * position_stride + group * group_stride + channels[None, :]
        live = seen[:, None] & is_channel[None, :]
        k = tl.load(k_ptr + places, mask=live, other=0.0)
        v = tl.load(v_ptr + places, mask=live, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp2(highest - new_highest)
        p = tl.exp2(scores - new_highest[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        highest = new_highest

    head = row * H + group * R + heads
    inside = is_head[:, None] & is_channel[None, :]
    if PARTS == 1:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # an empty context has output 0
        tl.store(sums_ptr + head[:, None] * C + channels[None, :], acc.to(sums_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(sums_ptr + (head * PARTS + part)[:, None] * C + channels[None, :], acc, mask=inside)
        tl.store(stats_ptr + (head * PARTS + part) * 2, highest, mask=is_head)
        tl.store(stats_ptr + (head * PARTS + part) * 2 + 1, total, mask=is_head)


@triton.jit
def _join_parts_kernel(
    sums_ptr,
    stats_ptr,
    contexts_ptr,
    out_ptr,
    H: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    row = tl.program_id(1).to(tl.int64)
    head = row * H + tl.program_id(0)
    parts = tl.arange(0, PARTS)
    channels = tl.arange(0, BLOCK_C)
    context = tl.load(contexts_ptr + row).to(tl.int32)
    written = parts * _part_length(context, PARTS, POSITIONS) < context
    highest = tl.load(stats_ptr + (head * PARTS + parts) * 2, mask=written, other=float("-inf"))
    totals = tl.load(stats_ptr + (head * PARTS + parts) * 2 + 1, mask=written, other=0.0)
    share = tl.where(written, tl.exp2(highest - tl.max(highest, axis=0)), 0.0)
    sums_ptrs = sums_ptr + (head * PARTS + parts)[:, None] * C + channels[None, :]
    sums = tl.load(sums_ptrs, mask=written[:, None] & (channels < C)[None, :], other=0.0)
    total = tl.sum(share * totals, axis=0)
    out = tl.sum(share[:, None] * sums, axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * C + channels, out.to(out_ptr.dtype.element_ty), mask=channels < C)


# Heads per program when queries and keys are rotated.
HEADS = 8


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: tuple[Tensor, Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Rotate q and k, and store k and v in the cache. Returns the rotated q [T, H, C]. See the reference."""
    num_tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    cos, sin = rope
    out = torch.empty(num_tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q, k, v))
    _rotate_kernel[(num_tokens, triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS))](
        q,
        k,
        v,
        cos,
        sin,
        out,
        k_cache,
        v_cache,
        slot_mapping,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        cos.stride(0),
        sin.stride(0),
        k_cache.stride(1),
        H=heads,
        G=kv_heads,
        C=head_dim,
        R=cos.shape[-1],
        HEADS=HEADS,
        BLOCK_R=triton.next_power_of_2(cos.shape[-1] // 2),
        BLOCK_C=triton.next_power_of_2(head_dim),
        num_warps=2,
        enable_fp_fusion=False,  # or both products and their sum become one operation with one rounding
        **early_launch(),
    )
    return out


@triton.jit
def _rotate_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    q_stride,
    k_stride,
    v_stride,
    cos_stride,
    sin_stride,
    slot_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EARLY: tl.constexpr,
):
    """On the second axis, the first programs rotate query heads. The others rotate keys and store keys and values.

    R channels of each head are rotated, the others are copied.
    """
    wait_for_inputs(EARLY)
    token = tl.program_id(0).to(tl.int64)
    query_blocks: tl.constexpr = (H + HEADS - 1) // HEADS
    block = tl.program_id(1)
    channels = tl.arange(0, BLOCK_R)
    half: tl.constexpr = R // 2
    is_channel = channels < half
    whole = tl.arange(0, BLOCK_C)
    is_rest = (whole >= R) & (whole < C)
    # Cosines and sines are loaded in the shape of the heads, so that each thread has both factors.
    angles = tl.zeros([HEADS, 1], dtype=tl.int32) + channels[None, :]
    cos_ptrs, sin_ptrs = cos_ptr + token * cos_stride + angles, sin_ptr + token * sin_stride + angles
    cos_first = tl.load(cos_ptrs, mask=is_channel[None, :], other=0.0)
    cos_second = tl.load(cos_ptrs + half, mask=is_channel[None, :], other=0.0)
    sin_first = tl.load(sin_ptrs, mask=is_channel[None, :], other=0.0)
    sin_second = tl.load(sin_ptrs + half, mask=is_channel[None, :], other=0.0)
    if block < query_blocks:
        heads = block * HEADS + tl.arange(0, HEADS)
        live = (heads < H)[:, None] & is_channel[None, :]
        places = (token * H + heads[:, None]) * C + channels[None, :]
        q_ptrs = q_ptr + token * q_stride + heads[:, None] * C + channels[None, :]
        first = tl.load(q_ptrs, mask=live, other=0.0)
        second = tl.load(q_ptrs + half, mask=live, other=0.0)
        tl.store(out_ptr + places, _rotated(first, cos_first, -second, sin_first), mask=live)
        tl.store(out_ptr + places + half, _rotated(second, cos_second, first, sin_second), mask=live)
        if R < C:
            rest = heads[:, None] * C + whole[None, :]
            kept = (heads < H)[:, None] & is_rest[None, :]
            unchanged = tl.load(q_ptr + token * q_stride + rest, mask=kept, other=0.0)
            tl.store(out_ptr + token * H * C + rest, unchanged, mask=kept)
    else:
        heads = (block - query_blocks) * HEADS + tl.arange(0, HEADS)
        live = (heads < G)[:, None] & is_channel[None, :]
        k_ptrs = k_ptr + token * k_stride + heads[:, None] * C + channels[None, :]
        slot = tl.load(slots_ptr + token) * slot_stride
        into = slot + heads[:, None] * C + channels[None, :]
        first = tl.load(k_ptrs, mask=live, other=0.0)
        second = tl.load(k_ptrs + half, mask=live, other=0.0)
        tl.store(k_cache_ptr + into, _rotated(first, cos_first, -second, sin_first), mask=live)
        tl.store(k_cache_ptr + into + half, _rotated(second, cos_second, first, sin_second), mask=live)
        rest = heads[:, None] * C + whole[None, :]
        if R < C:
            kept = (heads < G)[:, None] & is_rest[None, :]
            tl.store(k_cache_ptr + slot + rest, tl.load(k_ptr + token * k_stride + rest, mask=kept, other=0.0), mask=kept)
        is_value = (heads < G)[:, None] & (whole < C)[None, :]
        values = tl.load(v_ptr + token * v_stride + rest, mask=is_value, other=0.0)
        tl.store(v_cache_ptr + slot + rest, values, mask=is_value)


@triton.jit
def _rotated(x, cos, other, sin):
    """x * cos + other * sin. Each product is rounded to the dtype of the tensors, as in torch."""
    dtype = x.dtype
    left = (x.to(tl.float32) * cos.to(tl.float32)).to(dtype).to(tl.float32)
    right = (other.to(tl.float32) * sin.to(tl.float32)).to(dtype).to(tl.float32)
    return (left + right).to(dtype)
