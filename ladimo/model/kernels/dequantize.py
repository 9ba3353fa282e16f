"""What kernels share that read weights stored as integers: see `ladimo.model.quantization` for the format.

A kernel walks over the stored elements of a row, W of them, each of which holds PARTS columns. With BITS 16 they are the
weights as they are; with 8 a byte is one column, with 4 it is two: part p of element j is column p * W + j.
"""

import triton
import triton.language as tl
from torch import Tensor

from ladimo.model.quantization import GROUP as COLUMNS_PER_SCALE
from ladimo.model.quantization import Weights

GROUP = tl.constexpr(COLUMNS_PER_SCALE)


def stored(weights: Weights) -> tuple[Tensor, Tensor | None, dict[str, int]]:
    """What a kernel is given: the elements, their scales if there are any, and the constants."""
    if isinstance(weights, Tensor):
        return weights, None, {"W": weights.shape[-1], "BITS": 16, "PARTS": 1}
    return weights.data, weights.scales, {"W": weights.data.shape[-1], "BITS": weights.bits, "PARTS": 8 // weights.bits}


@triton.jit
def load_columns(ptrs, start, inner, live, LIMIT: tl.constexpr, WHOLE: tl.constexpr):
    """A tile [M, B] of rows that are `live` [M], at ptrs + start; columns from LIMIT on are 0. WHOLE: there are none."""
    if WHOLE:
        tile = tl.load(ptrs + start, mask=live[:, None], other=0.0)
    else:
        tile = tl.load(ptrs + start, mask=live[:, None] & (start + inner < LIMIT)[None, :], other=0.0)
    return tile


@triton.jit
def load_elements(ptrs, start, inner, LIMIT: tl.constexpr, WHOLE: tl.constexpr):
    """A tile [B, N] of stored weights, columns down; see `load_columns`."""
    return tl.load(ptrs + start) if WHOLE else tl.load(ptrs + start, mask=(start + inner < LIMIT)[:, None], other=0)


@triton.jit
def widen(elements, scales_ptr, rows, start, W: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr, AXIS: tl.constexpr):
    """The weights in one part of the stored elements start .. start + B of `rows`, columns along AXIS: `elements` is [N, B] and
    `rows` [N, 1] where AXIS is 1, [B, N] and [1, N] where it is 0. fp32 from integers; with BITS 16 what is there. B is a
    multiple of GROUP."""
    if BITS == 16:
        weights = elements
    else:
        # A scale is loaded once and spread over its group: one load per weight would cost more than the weights themselves.
        spans: tl.constexpr = elements.shape[AXIS] // GROUP
        groups = start // GROUP + tl.arange(0, spans)
        live = groups < W // GROUP
        scales_ptr += rows * (W // GROUP * (8 // BITS)) + PART * (W // GROUP)
        if AXIS == 1:
            scales = tl.load(scales_ptr + groups[None, :], mask=live[None, :], other=0.0)
            scales = tl.broadcast_to(scales[:, :, None], (elements.shape[0], spans, GROUP))
        else:
            scales = tl.load(scales_ptr + groups[:, None], mask=live[:, None], other=0.0)
            scales = tl.broadcast_to(scales[:, None, :], (spans, GROUP, elements.shape[1]))
        if BITS == 4:
            elements = elements.to(tl.int32) << (28 - 4 * PART) >> 28
        weights = elements.to(tl.float32) * tl.reshape(scales, (elements.shape[0], elements.shape[1]))
    return weights
