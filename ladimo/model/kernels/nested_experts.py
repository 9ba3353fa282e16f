"""Running experts with nested weights. References: `TorchBackend.apply_nested`, `ladimo.model.refinement`.

1. `product`: gate and up of every token at its bits.
2. `_activate_kernel`: silu(gate) * up, and the neurons' scores of tokens that refine.
3. `_refine_kernel`: chooses a token's neurons by the mean of its scores, reads the low plane of gate and up for them, and
   replaces their activations.
4. `product`: down at the tokens' bits.
5. `_low_columns_kernel`: what the low plane of down adds for refined neurons. It is stored once more, by neuron.
6. `_finish_kernel` adds the parts and counts refined neurons.

Each step has a fixed grid. A program that finds nothing to do returns at once, and rows of a plane that no token of the tile
wants are not read: loads of the others are masked. With few tokens these are the rows of the chosen neurons. With many tokens
they are nearly all, so the same kernels are then the dense form, in which neurons are masked.

A layer of method `nested` has one expert. More experts work, too: a tile computes those that any of its tokens chose.

Legend: T tokens, D hidden_size, F moe_intermediate_size, E experts, K places per token, G = REFINED_GROUPS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladimo.model.kernels.experts import silu
from ladimo.model.kernels.nested import DECODE_TOKENS, MOST_PROGRAMS, Tokens, product
from ladimo.model.kernels.planes import (
    GROUP,
    add_plane,
    bits_of_tokens,
    count_chosen,
    integers,
    runs_expert,
    tokens_that_refine,
)
from ladimo.model.nested import NestedWeights
from ladimo.model.plane_layout import BLOCK_COLUMNS, DownWeights
from ladimo.model.precision import REFINED_GROUPS

# Longer inputs are computed in parts, because gate and up are kept in fp32 for every neuron.
MAX_TOKENS = 2048
ACTIVATE_TILE = 1024
REFINE_NEURONS = 32  # of a program
LOW_BYTES = 64  # of a neuron's row, of a program
OUT_TILE = 1024


def apply_nested(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: NestedWeights,
    down: DownWeights,
    norms: Tensor,
    bits: Tensor,
    refine: Tensor,
    decode_tokens: int = DECODE_TOKENS,
    max_tokens: int = MAX_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Run the chosen experts: output [T, D] and the refined neurons [T, G] int64. See the reference.

    The planes are in words (`plane_layout`). Up to `decode_tokens` tokens are computed in the tiles of decoding.
    """
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    counts = torch.empty(len(out), REFINED_GROUPS, dtype=torch.int64, device=out.device)
    for begin in range(0, len(out), max_tokens):
        part = slice(begin, begin + max_tokens)
        x, weights, ids = (tensor[part].contiguous() for tensor in (hidden_states, topk_weights, topk_ids))
        few = len(out) <= decode_tokens
        _apply(x, weights, Tokens(bits[part], ids), gate_up, down, norms, refine[part], out[part], counts[part], few)
    return out, counts


def _apply(
    x: Tensor,
    weights: Tensor,
    tokens: Tokens,
    gate_up: NestedWeights,
    down: DownWeights,
    norms: Tensor,
    refine: Tensor,
    out: Tensor,
    counts: Tensor,
    few: bool,
) -> None:
    low_rows, low_columns = gate_up.low, down.neurons
    num_tokens, (num_experts, hidden_size, size) = len(x), down.shape
    rule = tokens.bits, tokens.bits.stride(0), refine, refine.stride(0), tokens.ids
    places = tokens.places
    sizes = {"E": num_experts, "F": size}
    tile = max(8, triton.next_power_of_2(num_tokens)) if few else 64

    gates = product(x, gate_up, tokens, few)
    hidden = x.new_empty(num_tokens, num_experts, size)
    block = min(ACTIVATE_TILE, triton.next_power_of_2(size))
    blocks = triton.cdiv(size, block)
    scores = torch.empty(num_tokens, num_experts, size, dtype=torch.float32, device=x.device)
    sums = torch.empty(num_tokens, num_experts, blocks, dtype=torch.float32, device=x.device)
    _activate_kernel[(num_tokens, num_experts, blocks)](
        gates, weights, *rule, norms, hidden, scores, sums, num_tokens, **sizes, **places, PARTS=len(gates), BLOCK=block
    )
    chosen = torch.empty(num_tokens, num_experts, size, dtype=torch.uint8, device=x.device)
    _refine_kernel[(num_experts * triton.cdiv(size, REFINE_NEURONS), triton.cdiv(num_tokens, tile))](
        x,
        gates,
        weights,
        *rule,
        scores,
        sums,
        low_rows.data,
        low_rows.scales,
        chosen,
        hidden,
        num_tokens,
        **sizes,
        **places,
        D=hidden_size,
        EVEN=hidden_size % BLOCK_COLUMNS == 0,
        BLOCKS=low_rows.scales.shape[-1] // 8,
        SUMS=blocks,
        PARTS=len(gates),
        M=tile,
        N=REFINE_NEURONS,
        num_warps=2 if few else 4,
        num_stages=3,
    )

    parts = product(hidden, down, tokens, few, sum_experts=True)
    groups, width = low_columns.scales.shape[1:]
    tiles = triton.cdiv(width // 2, LOW_BYTES)
    splits = max(1, min(num_experts * groups, MOST_PROGRAMS // tiles)) if few else 1
    low = torch.empty(splits, num_tokens, hidden_size, dtype=torch.float32, device=x.device)
    _low_columns_kernel[(tiles, triton.cdiv(num_tokens, tile), splits)](
        hidden,
        *rule,
        chosen,
        low_columns.data,
        low_columns.scales,
        low,
        num_tokens,
        **sizes,
        **places,
        D=hidden_size,
        W=width // 2,
        GROUPS=groups,
        SPLIT_GROUPS=triton.cdiv(num_experts * groups, splits),
        M=max(16, tile),
        BYTES=LOW_BYTES,
        num_warps=4,
        num_stages=3,
    )
    block = min(OUT_TILE, triton.next_power_of_2(hidden_size))
    blocks = triton.cdiv(hidden_size, block)
    _finish_kernel[(num_tokens, blocks)](
        parts,
        low,
        *rule,
        chosen,
        out,
        counts,
        num_tokens,
        **sizes,
        D=hidden_size,
        PARTS=len(parts),
        SPLITS=splits,
        GROUPS=REFINED_GROUPS,
        COUNTED=triton.next_power_of_2(triton.cdiv(REFINED_GROUPS, blocks)),
        BLOCK=block,
    )


@triton.jit
def _hidden_of(gates_ptr, ptrs, mask, num_tokens, E: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr):
    """Gate and up at places `ptrs` of [T, E, 2F]: the sums of their parts, in order."""
    gate = tl.load(gates_ptr + ptrs, mask=mask, other=0.0)
    up = tl.load(gates_ptr + ptrs + F, mask=mask, other=0.0)
    for part in range(1, PARTS):
        step = part * num_tokens.to(tl.int64) * (E * 2 * F)
        gate += tl.load(gates_ptr + step + ptrs, mask=mask, other=0.0)
        up += tl.load(gates_ptr + step + ptrs + F, mask=mask, other=0.0)
    return gate, up


@triton.jit
def _expert_weight(weights_ptr, ids_ptr, tokens, live, expert, PLACES: tl.constexpr, BLOCK_PLACES: tl.constexpr):
    """The expert's weight for each of the tokens [M]; 0 where it was not chosen."""
    places = tl.arange(0, BLOCK_PLACES)[None, :]
    mask = live[:, None] & (places < PLACES)
    at = tokens[:, None] * PLACES + places
    ids = tl.load(ids_ptr + at, mask=mask, other=-1)
    weights = tl.load(weights_ptr + at, mask=mask, other=0.0)
    return tl.sum(tl.where(ids == expert, weights, 0.0), axis=1)


@triton.jit(do_not_specialize=["num_tokens", "bits_stride", "refine_stride"])
def _activate_kernel(
    gates_ptr,
    weights_ptr,
    bits_ptr,
    bits_stride,
    refine_ptr,
    refine_stride,
    ids_ptr,
    norms_ptr,
    hidden_ptr,
    scores_ptr,
    sums_ptr,
    num_tokens,
    E: tl.constexpr,
    F: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """hidden[t, e, n..n+BLOCK] = weight * silu(gate) * up, 0 if t did not choose e. If it refines: scores and their sum."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1)
    one = token + tl.arange(0, 1)
    live = one < num_tokens
    runs = tl.max(runs_expert(ids_ptr, one, live, expert, PLACES, BLOCK_PLACES).to(tl.int32), axis=0) > 0
    weight = tl.sum(_expert_weight(weights_ptr, ids_ptr, one, live, expert, PLACES, BLOCK_PLACES), axis=0)
    bits = bits_of_tokens(bits_ptr, bits_stride, one, live, True)
    refining = tl.max(tokens_that_refine(bits, refine_ptr, refine_stride, one, live)[0].to(tl.int32), axis=0) > 0

    neurons = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = neurons < F
    gate, up = _hidden_of(gates_ptr, (token * E + expert) * (2 * F) + neurons, inside & runs, num_tokens, E, F, PARTS)
    hidden = silu(gate) * up
    at = (token * E + expert) * F + neurons
    tl.store(hidden_ptr + at, (hidden * weight).to(hidden_ptr.dtype.element_ty), mask=inside)
    if refining:
        scores = tl.abs(hidden) * tl.load(norms_ptr + expert * F + neurons, mask=inside, other=0.0)
        tl.store(scores_ptr + at, scores, mask=inside)
        blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
        tl.store(sums_ptr + (token * E + expert) * blocks + tl.program_id(2), tl.sum(scores, axis=0))


@triton.jit(do_not_specialize=["num_tokens", "bits_stride", "refine_stride"])
def _refine_kernel(
    x_ptr,
    gates_ptr,
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
):
    """Choose and refine N neurons of an expert for M tokens: chosen[t, e, n..n+N], and hidden where they are chosen."""
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

    gate, up = _hidden_of(
        gates_ptr, ((tokens * E + expert) * (2 * F))[None, :] + neurons[:, None], chosen, num_tokens, E, F, PARTS
    )
    rows = expert.to(tl.int64) * (2 * F) + tl.minimum(neurons, F - 1)[:, None]
    x_ptrs = x_ptr + tokens[None, :] * D
    mask, wanted = refining[None, :], wanted[:, None]
    gate = add_plane(gate, x_ptrs, mask, low_ptr, low_scales_ptr, None, rows, wanted, 0, BLOCKS, D, BLOCKS, EVEN, True)
    up = add_plane(up, x_ptrs, mask, low_ptr, low_scales_ptr, None, rows + F, wanted, 0, BLOCKS, D, BLOCKS, EVEN, True)
    weight = _expert_weight(weights_ptr, ids_ptr, tokens, live, expert, PLACES, BLOCK_PLACES)
    hidden = silu(gate) * up * weight[None, :]
    tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask=chosen)


@triton.jit(do_not_specialize=["num_tokens", "bits_stride", "refine_stride"])
def _low_columns_kernel(
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
):
    """One part of what the low plane of down adds to M tokens that refine, over some groups of neurons: 2 BYTES outputs, those
    in the lower halves of a neuron's bytes and those in the upper halves."""
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


@triton.jit(do_not_specialize=["num_tokens", "bits_stride", "refine_stride"])
def _finish_kernel(
    parts_ptr,
    low_ptr,
    bits_ptr,
    bits_stride,
    refine_ptr,
    refine_stride,
    ids_ptr,
    chosen_ptr,
    out_ptr,
    counts_ptr,
    num_tokens,
    E: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t, n..n+BLOCK] = the sum of all parts, in order. The programs of a token share the groups they count."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1)
    one = token + tl.arange(0, 1)
    bits = bits_of_tokens(bits_ptr, bits_stride, one, one < num_tokens, True)
    refining, _ = tokens_that_refine(bits, refine_ptr, refine_stride, one, one < num_tokens)
    refines = tl.max(refining.to(tl.int32), axis=0) > 0
    columns = place * BLOCK + tl.arange(0, BLOCK)
    live = columns < D
    out = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(PARTS):
        out += tl.load(parts_ptr + (part * num_tokens + token) * D + columns, mask=live, other=0.0)
    for part in range(SPLITS):
        out += tl.load(low_ptr + (part * num_tokens + token) * D + columns, mask=live & refines, other=0.0)
    tl.store(out_ptr + token * D + columns, out.to(out_ptr.dtype.element_ty), mask=live)
    groups, counts = count_chosen(chosen_ptr + token * (E * F), place * COUNTED, refines, E * F, GROUPS, COUNTED)
    tl.store(counts_ptr + token * GROUPS + groups, counts, mask=groups < GROUPS)
