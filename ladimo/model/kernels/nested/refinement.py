"""Reading the low plane for the neurons that a token chose. `ladimo.model.kernels.nested.experts` launches these kernels.

Rows of the low plane that no token of the tile wants are not read: loads of the others are masked. So with few tokens only the
rows of the chosen neurons are read.

Legend: T tokens, D hidden_size, F moe_intermediate_size, E experts.
"""

import triton
import triton.language as tl

from ladimo.model.kernels.early_launch import wait_for_inputs
from ladimo.model.kernels.nested.planes import GROUP, add_plane, bits_of_tokens, integers, runs_expert, tokens_that_refine
from ladimo.model.kernels.norm_activation import gelu, silu


@triton.jit
def hidden_of(gates_ptr, ptrs, mask, num_tokens, E: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr):
    """Gate and up at places `ptrs` of [T, E, 2F]: the sums of their parts, in order."""
    gate = tl.load(gates_ptr + ptrs, mask=mask, other=0.0)
    up = tl.load(gates_ptr + ptrs + F, mask=mask, other=0.0)
    for part in range(1, PARTS):
        step = part * num_tokens.to(tl.int64) * (E * 2 * F)
        gate += tl.load(gates_ptr + step + ptrs, mask=mask, other=0.0)
        up += tl.load(gates_ptr + step + ptrs + F, mask=mask, other=0.0)
    return gate, up


@triton.jit
def up_of(gates_ptr, up_bias_ptr, ptrs, bias_ptrs, mask, num_tokens, E: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr):
    """The same without a gate: up at places `ptrs` of [T, E, F], with the bias at places `bias_ptrs` of [E, F]."""
    up = tl.load(gates_ptr + ptrs, mask=mask, other=0.0)
    for part in range(1, PARTS):
        up += tl.load(gates_ptr + part * num_tokens.to(tl.int64) * (E * F) + ptrs, mask=mask, other=0.0)
    return up + tl.load(up_bias_ptr + bias_ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def expert_weight(weights_ptr, ids_ptr, tokens, live, expert, PLACES: tl.constexpr, BLOCK_PLACES: tl.constexpr):
    """The expert's weight for each of the tokens [M]; 0 where it was not chosen."""
    places = tl.arange(0, BLOCK_PLACES)[None, :]
    mask = live[:, None] & (places < PLACES)
    at = tokens[:, None] * PLACES + places
    ids = tl.load(ids_ptr + at, mask=mask, other=-1)
    weights = tl.load(weights_ptr + at, mask=mask, other=0.0)
    return tl.sum(tl.where(ids == expert, weights, 0.0), axis=1)


@triton.jit(do_not_specialize=["num_tokens", "bits_stride", "refine_stride"])
def refine_kernel(
    x_ptr,
    gates_ptr,
    up_bias_ptr,
    weights_ptr,
    bits_ptr,
    bits_stride,
    refine_ptr,
    refine_stride,
    ids_ptr,
    scores_ptr,
    sums_ptr,
    low_ptr,
    low_scales_ptr,
    chosen_ptr,
    hidden_ptr,
    num_tokens,
    E: tl.constexpr,
    F: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    D: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Choose and refine N neurons of an expert for M tokens: chosen[t, e, n..n+N], and hidden where they are chosen."""
    wait_for_inputs(EARLY)
    tiles: tl.constexpr = (F + N - 1) // N
    expert = tl.program_id(0) // tiles
    tokens = tl.program_id(1) * M + tl.arange(0, M)
    live = tokens < num_tokens
    tokens = tokens.to(tl.int64)
    bits = bits_of_tokens(bits_ptr, bits_stride, tokens, live, True)
    refining, refine = tokens_that_refine(bits, refine_ptr, refine_stride, tokens, live)
    if tl.max(refining.to(tl.int32), axis=0) == 0:
        return
    # The mean over the neurons that a token runs. Sums are added in order, so that it does not depend on the tile.
    total = tl.zeros([M], dtype=tl.float32)
    for place in range(E * SUMS):
        total += tl.load(sums_ptr + tokens * (E * SUMS) + place, mask=refining, other=0.0)
    running = tl.zeros([M], dtype=tl.float32)
    for number in range(E):
        running += runs_expert(ids_ptr, tokens, refining, number, PLACES, BLOCK_PLACES).to(tl.float32)
    least = tl.where(refining, refine, 0.0) * total / tl.maximum(running * F, 1.0)

    runs = runs_expert(ids_ptr, tokens, refining, expert, PLACES, BLOCK_PLACES)
    neurons = (tl.program_id(0) % tiles) * N + tl.arange(0, N)
    inside = (neurons < F)[:, None] & refining[None, :]
    at = ((tokens * E + expert) * F)[None, :] + neurons[:, None]
    scores = tl.load(scores_ptr + at, mask=inside, other=0.0)
    chosen = inside & runs[None, :] & (scores >= least[None, :])
    tl.store(chosen_ptr + at, chosen.to(tl.uint8), mask=inside)
    wanted = tl.max(chosen.to(tl.int32), axis=1) > 0
    if tl.max(wanted.to(tl.int32), axis=0) == 0:
        return

    x_ptrs = x_ptr + tokens[None, :] * D
    mask, wanted, last = refining[None, :], wanted[:, None], tl.minimum(neurons, F - 1)[:, None]
    if up_bias_ptr is None:
        places = ((tokens * E + expert) * (2 * F))[None, :] + neurons[:, None]
        gate, up = hidden_of(gates_ptr, places, chosen, num_tokens, E, F, PARTS)
        rows = expert.to(tl.int64) * (2 * F) + last
        gate = add_plane(gate, x_ptrs, mask, low_ptr, low_scales_ptr, None, rows, wanted, 0, BLOCKS, D, BLOCKS, EVEN, True)
        up = add_plane(up, x_ptrs, mask, low_ptr, low_scales_ptr, None, rows + F, wanted, 0, BLOCKS, D, BLOCKS, EVEN, True)
        hidden = silu(gate) * up
    else:
        rows = expert.to(tl.int64) * F + last
        up = up_of(gates_ptr, up_bias_ptr, at, rows, chosen, num_tokens, E, F, PARTS)
        up = add_plane(up, x_ptrs, mask, low_ptr, low_scales_ptr, None, rows, wanted, 0, BLOCKS, D, BLOCKS, EVEN, True)
        hidden = gelu(up)
    weight = expert_weight(weights_ptr, ids_ptr, tokens, live, expert, PLACES, BLOCK_PLACES)
    tl.store(hidden_ptr + at, (hidden * weight[None, :]).to(hidden_ptr.dtype.element_ty), mask=chosen)


@triton.jit(do_not_specialize=["num_tokens", "bits_stride", "refine_stride"])
def low_columns_kernel(
    hidden_ptr,
    bits_ptr,
    bits_stride,
    refine_ptr,
    refine_stride,
    ids_ptr,
    chosen_ptr,
    low_ptr,
    low_scales_ptr,
    out_ptr,
    num_tokens,
    E: tl.constexpr,
    F: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLIT_GROUPS: tl.constexpr,
    M: tl.constexpr,
    BYTES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One part of what the low plane of down adds to M tokens that refine, over some groups of neurons: 2 BYTES outputs, those
    in the lower halves of a neuron's bytes and those in the upper halves."""
    wait_for_inputs(EARLY)
    tokens = tl.program_id(1) * M + tl.arange(0, M)
    live = tokens < num_tokens
    tokens = tokens.to(tl.int64)
    bits = bits_of_tokens(bits_ptr, bits_stride, tokens, live, True)
    refining, _ = tokens_that_refine(bits, refine_ptr, refine_stride, tokens, live)
    if tl.max(refining.to(tl.int32), axis=0) == 0:
        return
    places = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    inside = (places < W)[None, :]
    lower = tl.zeros([M, BYTES], dtype=tl.float32)
    upper = tl.zeros([M, BYTES], dtype=tl.float32)
    begin = tl.program_id(2) * SPLIT_GROUPS
    for number in range(begin, tl.minimum(begin + SPLIT_GROUPS, E * GROUPS)):
        expert = number // GROUPS
        neurons = (number % GROUPS) * GROUP + tl.arange(0, GROUP)
        at = ((tokens * E + expert) * F)[:, None] + neurons[None, :]
        exists = (neurons < F)[None, :]
        wanted = tl.load(chosen_ptr + at, mask=exists & refining[:, None], other=0) > 0
        read = tl.max(wanted.to(tl.int32), axis=0) > 0
        hidden = tl.load(hidden_ptr + at, mask=wanted, other=0.0)
        rows = (tl.cast(number, tl.int64) * GROUP + tl.arange(0, GROUP))[:, None]
        low = tl.load(low_ptr + rows * W + places[None, :], mask=read[:, None] & inside, other=0)
        scale_ptrs = low_scales_ptr + tl.cast(number, tl.int64) * (2 * W) + places
        lower_scales = tl.load(scale_ptrs, mask=places < W, other=0.0).to(tl.float32)
        upper_scales = tl.load(scale_ptrs + W, mask=places < W, other=0.0).to(tl.float32)
        # A half holds its integer in two's complement: turning its highest bit adds 8.
        low = low.to(tl.int16) ^ 0x88
        lower += tl.dot(hidden, integers(low & 15, hidden.dtype), input_precision="ieee") * lower_scales[None, :]
        upper += tl.dot(hidden, integers((low >> 4) & 15, hidden.dtype), input_precision="ieee") * upper_scales[None, :]
    out_ptrs = out_ptr + ((tl.program_id(2) * num_tokens + tokens) * D)[:, None] + places[None, :]
    mask = refining[:, None] & inside
    tl.store(out_ptrs, lower, mask=mask & (places < D)[None, :])
    tl.store(out_ptrs + W, upper, mask=mask & (places + W < D)[None, :])
