"""The output head with nested weights. References: `TorchBackend.nested_linear`, `nested.refinement.refine_logits`.

The logits at each row's bits are one `product`. A second pass finds the best logit of each row, and a third reads the low plane
of the words that are likely at 4 bits. With few rows these are few words, whose rows alone are read. With many rows they are
nearly all. If no row refines, the second pass returns at once and the third only adds parts.

Legend: R rows, D hidden_size, V vocabulary, G = REFINED_GROUPS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladimo.model.kernels.early_launch import early_launch, wait_for_inputs
from ladimo.model.kernels.nested.linear import DECODE_TOKENS, Tokens, product
from ladimo.model.kernels.nested.planes import add_plane, bits_of_tokens, count_chosen, tokens_that_refine
from ladimo.model.nested.plane_layout import BLOCK_COLUMNS
from ladimo.model.nested.weights import NestedWeights
from ladimo.model.precision import REFINED_GROUPS

BEST_TILE = 2048  # words of a program that looks for the best
REFINE_WORDS = 32  # of a program
COUNTED = 4  # groups of words whose refined words a program counts
# More rows are computed in parts, because logits are kept in fp32.
MAX_ROWS = 512


def logits(
    x: Tensor,
    weights: NestedWeights,
    bits: Tensor,
    refine: Tensor,
    bias: Tensor | None = None,
    decode_rows: int = DECODE_TOKENS,
    max_rows: int = MAX_ROWS,
) -> tuple[Tensor, Tensor]:
    """x [R, D], bits and refine [R] -> logits [R, V] and the refined words [R, G] int64. See the references. Both planes are in
    words (`plane_layout`). Up to `decode_rows` rows are computed in the tiles of decoding."""
    out = x.new_empty(len(x), weights.shape[0])
    counts = torch.empty(len(x), REFINED_GROUPS, dtype=torch.int64, device=x.device)
    for begin in range(0, len(x), max_rows):
        part = slice(begin, begin + max_rows)
        _logits(x[part].contiguous(), weights, bits[part], refine[part], bias, out[part], counts[part], len(x) <= decode_rows)
    return out, counts


def _logits(
    x: Tensor,
    weights: NestedWeights,
    bits: Tensor,
    refine: Tensor,
    bias: Tensor | None,
    out: Tensor,
    counts: Tensor,
    few: bool,
) -> None:
    low = weights.low
    (num_words, hidden_size), num_rows = weights.shape, len(x)
    rule = bits, bits.stride(0), refine, refine.stride(0)
    parts = product(x, weights, Tokens(bits), few)
    block = min(BEST_TILE, triton.next_power_of_2(num_words))
    blocks = triton.cdiv(num_words, block)
    best = torch.empty(num_rows, blocks, dtype=torch.float32, device=x.device)
    _best_kernel[(num_rows, blocks)](
        parts, bias, *rule, best, num_rows, V=num_words, PARTS=len(parts), BLOCK=block, **early_launch()
    )
    tile = max(8, triton.next_power_of_2(num_rows)) if few else 64
    chosen = torch.empty(num_rows, num_words, dtype=torch.uint8, device=x.device)
    _refine_words_kernel[(triton.cdiv(num_words, REFINE_WORDS), triton.cdiv(num_rows, tile))](
        x,
        parts,
        bias,
        *rule,
        best,
        low.data,
        low.scales,
        chosen,
        out,
        num_rows,
        V=num_words,
        D=hidden_size,
        EVEN=hidden_size % BLOCK_COLUMNS == 0,
        BLOCKS=low.scales.shape[-1] // 8,
        BEST=blocks,
        PARTS=len(parts),
        M=tile,
        N=REFINE_WORDS,
        num_warps=2 if few else 4,
        num_stages=3,
        **early_launch(),
    )
    _count_kernel[(num_rows, REFINED_GROUPS // COUNTED)](
        chosen, *rule, counts, V=num_words, GROUPS=REFINED_GROUPS, COUNTED=COUNTED, **early_launch()
    )


@triton.jit
def _sum_parts(parts_ptr, bias_ptr, at, words, mask, step, PARTS: tl.constexpr):
    """Logits before refinement at places `at` of [R, V]: the sum of the parts in order, plus bias."""
    out = tl.load(parts_ptr + at, mask=mask, other=0.0)
    for part in range(1, PARTS):
        out += tl.load(parts_ptr + part * step + at, mask=mask, other=0.0)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + words, mask=mask, other=0.0).to(tl.float32)
    return out


@triton.jit(do_not_specialize=["num_rows", "bits_stride", "refine_stride"])
def _best_kernel(
    parts_ptr,
    bias_ptr,
    bits_ptr,
    bits_stride,
    refine_ptr,
    refine_stride,
    best_ptr,
    num_rows,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """best[r, i] = the highest logit of block i of words, if row r refines."""
    wait_for_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    one = row + tl.arange(0, 1)
    bits = bits_of_tokens(bits_ptr, bits_stride, one, one < num_rows, True)
    refining, _ = tokens_that_refine(bits, refine_ptr, refine_stride, one, one < num_rows)
    if tl.max(refining.to(tl.int32), axis=0) == 0:
        return
    words = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    step = num_rows.to(tl.int64) * V
    out = _sum_parts(parts_ptr, bias_ptr, row * V + words, words, words < V, step, PARTS)
    best = tl.max(tl.where(words < V, out, float("-inf")), axis=0)
    tl.store(best_ptr + row * ((V + BLOCK - 1) // BLOCK) + tl.program_id(1), best)


@triton.jit(do_not_specialize=["num_rows", "bits_stride", "refine_stride"])
def _refine_words_kernel(
    x_ptr,
    parts_ptr,
    bias_ptr,
    bits_ptr,
    bits_stride,
    refine_ptr,
    refine_stride,
    best_ptr,
    low_ptr,
    low_scales_ptr,
    chosen_ptr,
    out_ptr,
    num_rows,
    V: tl.constexpr,
    D: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BEST: tl.constexpr,
    PARTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[r, n..n+N] for M rows r, and which of these words are refined."""
    wait_for_inputs(EARLY)
    places = tl.program_id(1) * M + tl.arange(0, M)
    live = places < num_rows
    row = places.to(tl.int64)
    words = tl.program_id(0) * N + tl.arange(0, N)
    inside = (words < V)[:, None] & live[None, :]
    at = (row * V)[None, :] + words[:, None]
    out = _sum_parts(parts_ptr, bias_ptr, at, words[:, None], inside, num_rows.to(tl.int64) * V, PARTS)
    bits = bits_of_tokens(bits_ptr, bits_stride, row, live, True)
    refining, refine = tokens_that_refine(bits, refine_ptr, refine_stride, row, live)
    if tl.max(refining.to(tl.int32), axis=0) > 0:
        best = tl.full([M], float("-inf"), dtype=tl.float32)
        for place in range(BEST):
            best = tl.maximum(best, tl.load(best_ptr + row * BEST + place, mask=refining, other=float("-inf")))
        chosen = inside & refining[None, :] & (out >= (best - refine)[None, :])
        tl.store(chosen_ptr + at, chosen.to(tl.uint8), mask=inside & refining[None, :])
        wanted = tl.max(chosen.to(tl.int32), axis=1) > 0
        if tl.max(wanted.to(tl.int32), axis=0) > 0:
            rows = tl.minimum(words, V - 1).to(tl.int64)[:, None]
            x_ptrs, mask = x_ptr + row[None, :] * D, refining[None, :]
            low = tl.zeros([N, M], dtype=tl.float32)
            low = add_plane(
                low, x_ptrs, mask, low_ptr, low_scales_ptr, None, rows, wanted[:, None], 0, BLOCKS, D, BLOCKS, EVEN, True
            )
            out += tl.where(chosen, low, 0.0)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["bits_stride", "refine_stride"])
def _count_kernel(
    chosen_ptr,
    bits_ptr,
    bits_stride,
    refine_ptr,
    refine_stride,
    counts_ptr,
    V: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """counts[r, g] = the refined words of group g. The programs of a row share the groups."""
    wait_for_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64)
    one = row + tl.arange(0, 1)
    live = one >= 0
    bits = bits_of_tokens(bits_ptr, bits_stride, one, live, True)
    refining, _ = tokens_that_refine(bits, refine_ptr, refine_stride, one, live)
    refines = tl.max(refining.to(tl.int32), axis=0) > 0
    groups, counts = count_chosen(chosen_ptr + row * V, tl.program_id(1) * COUNTED, refines, V, GROUPS, COUNTED)
    tl.store(counts_ptr + row * GROUPS + groups, counts, mask=groups < GROUPS)
