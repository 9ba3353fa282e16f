"""Running experts with nested weights. References: `TorchBackend.apply_nested`, `ladimo.model.nested.refinement`.

1. `product`: gate and up of every token at its bits.
2. `_activate_kernel`: silu(gate) * up, or gelu(up + bias) without a gate, and the neurons' scores of tokens that refine.
3. `refine_kernel`: chooses a token's neurons by the mean of its scores, reads the low plane of gate and up for them, and
   replaces their activations.
4. `product`: down at the tokens' bits.
5. `low_columns_kernel`: what the low plane of down adds for refined neurons. It is stored once more, by neuron.
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

from ladimo.model.kernels.early_launch import early_launch, wait_for_inputs
from ladimo.model.kernels.nested.linear import DECODE_TOKENS, MOST_PROGRAMS, Tokens, product
from ladimo.model.kernels.nested.planes import (
    bits_of_tokens,
    count_chosen,
    runs_expert,
    tokens_that_refine,
)
from ladimo.model.kernels.nested.refinement import expert_weight, hidden_of, low_columns_kernel, refine_kernel, up_of
from ladimo.model.kernels.norm_activation import gelu, silu
from ladimo.model.nested.plane_layout import BLOCK_COLUMNS, DownWeights
from ladimo.model.nested.weights import NestedWeights
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
    up_bias: Tensor | None = None,
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
        tokens, results = Tokens(bits[part], ids), (out[part], counts[part])
        _apply(x, weights, tokens, gate_up, down, norms, refine[part], up_bias, *results, few)
    return out, counts


def _apply(
    x: Tensor,
    weights: Tensor,
    tokens: Tokens,
    gate_up: NestedWeights,
    down: DownWeights,
    norms: Tensor,
    refine: Tensor,
    up_bias: Tensor | None,
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
        gates,
        up_bias,
        weights,
        *rule,
        norms,
        hidden,
        scores,
        sums,
        num_tokens,
        **sizes,
        **places,
        PARTS=len(gates),
        BLOCK=block,
        **early_launch(),
    )
    chosen = torch.empty(num_tokens, num_experts, size, dtype=torch.uint8, device=x.device)
    refine_kernel[(num_experts * triton.cdiv(size, REFINE_NEURONS), triton.cdiv(num_tokens, tile))](
        x,
        gates,
        up_bias,
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
        **early_launch(),
    )

    parts = product(hidden, down, tokens, few, sum_experts=True)
    groups, width = low_columns.scales.shape[1:]
    tiles = triton.cdiv(width // 2, LOW_BYTES)
    splits = max(1, min(num_experts * groups, MOST_PROGRAMS // tiles)) if few else 1
    low = torch.empty(splits, num_tokens, hidden_size, dtype=torch.float32, device=x.device)
    low_columns_kernel[(tiles, triton.cdiv(num_tokens, tile), splits)](
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
        **early_launch(),
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
        **early_launch(),
    )


@triton.jit(do_not_specialize=["num_tokens", "bits_stride", "refine_stride"])
def _activate_kernel(
    gates_ptr,
    up_bias_ptr,
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
    EARLY: tl.constexpr,
):
    """hidden[t, e, n..n+BLOCK] = weight * silu(gate) * up, 0 if t did not choose e. If it refines: scores and their sum.
    With `up_bias_ptr` there is no gate: weight * gelu(up + bias)."""
    wait_for_inputs(EARLY)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1)
    one = token + tl.arange(0, 1)
    live = one < num_tokens
    runs = tl.max(runs_expert(ids_ptr, one, live, expert, PLACES, BLOCK_PLACES).to(tl.int32), axis=0) > 0
    weight = tl.sum(expert_weight(weights_ptr, ids_ptr, one, live, expert, PLACES, BLOCK_PLACES), axis=0)
    bits = bits_of_tokens(bits_ptr, bits_stride, one, live, True)
    refining = tl.max(tokens_that_refine(bits, refine_ptr, refine_stride, one, live)[0].to(tl.int32), axis=0) > 0

    neurons = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = neurons < F
    at = (token * E + expert) * F + neurons
    if up_bias_ptr is None:
        gate, up = hidden_of(gates_ptr, (token * E + expert) * (2 * F) + neurons, inside & runs, num_tokens, E, F, PARTS)
        hidden = silu(gate) * up
    else:
        hidden = gelu(up_of(gates_ptr, up_bias_ptr, at, expert * F + neurons, inside & runs, num_tokens, E, F, PARTS))
    tl.store(hidden_ptr + at, (hidden * weight).to(hidden_ptr.dtype.element_ty), mask=inside)
    if refining:
        scores = tl.abs(hidden) * tl.load(norms_ptr + expert * F + neurons, mask=inside, other=0.0)
        tl.store(scores_ptr + at, scores, mask=inside)
        blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
        tl.store(sums_ptr + (token * E + expert) * blocks + tl.program_id(2), tl.sum(scores, axis=0))


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
    EARLY: tl.constexpr,
):
    """out[t, n..n+BLOCK] = the sum of all parts, in order. The programs of a token share the groups they count."""
    wait_for_inputs(EARLY)
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
