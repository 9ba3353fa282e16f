"""Dequantization inside kernels: shared by all kernels that read weights. `ladimo.model.quantization` defines the formats.

A row of weights has W stored elements, and each element holds PARTS columns. BITS 16 means floating-point weights, one column
per element. BITS 8 means that a byte is one column, and BITS 4 that a byte is two columns. Part p of element j is column
p * W + j.
"""

import triton
import triton.language as tl
from torch import Tensor

from ladimo.model.quantization import GROUP as COLUMNS_PER_SCALE
from ladimo.model.quantization import Weights

GROUP = tl.constexpr(COLUMNS_PER_SCALE)


def stored(weights: Weights) -> tuple[Tensor, Tensor | None, dict[str, int]]:
    """The arguments of a kernel for these weights: the stored elements, their scales (or None), and the constants W, BITS,
    PARTS."""
    if isinstance(weights, Tensor):
        return weights, None, {"W": weights.shape[-1], "BITS": 16, "PARTS": 1}
    return weights.data, weights.scales, {"W": weights.data.shape[-1], "BITS": weights.bits, "PARTS": 8 // weights.bits}


@triton.jit
def load_columns(ptrs, start, inner, live, LIMIT: tl.constexpr, WHOLE: tl.constexpr):
    """Load a tile [M, B] at ptrs + start, only the `live` [M] rows. Columns from LIMIT on are 0; with WHOLE there are none."""
    if WHOLE:
        tile = tl.load(ptrs + start, mask=live[:, None], other=0.0)
    else:
        tile = tl.load(ptrs + start, mask=live[:, None] & (start + inner < LIMIT)[None, :], other=0.0)
    return tile


@triton.jit
def load_elements(ptrs, start, inner, LIMIT: tl.constexpr, WHOLE: tl.constexpr):
    """Load a tile [B, N] of stored weights, with columns along the first dimension. LIMIT and WHOLE as in `load_columns`."""
    return tl.load(ptrs + start) if WHOLE else tl.load(ptrs + start, mask=(start + inner < LIMIT)[:, None], other=0)


@triton.jit
def widen(elements, scales_ptr, rows, start, W: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr, AXIS: tl.constexpr):
    """Dequantize part PART of the stored elements start .. start + B of `rows`.

    Columns run along AXIS. If AXIS is 1, `elements` is [N, B] and `rows` is [N, 1]. If AXIS is 0, they are [B, N] and [1, N].
    The result has the shape of `elements`, in fp32; with BITS 16 it is `elements`. B must be a multiple of GROUP.
    """
    if BITS == 16:
        weights = elements
    else:
        # A scale is loaded once and broadcast over its group. A load per weight would cost more than the weights themselves.
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
