"""Linear layers. Reference: `ladimo.model.quantization.linear`.

One row needs a matrix-vector product, and a few rows need one tile. The time of both is the time to read the weights. Integers
are unpacked in registers. With many rows, multiplications take most of the time. The weights are then unpacked to floating
point once, and torch multiplies. Weights in floating point have a kernel for one row only; torch multiplies the others.

Weights are constant. So the kernel for one row reads the first of them before the inputs are there (`early_launch`).

Legend: K inputs, N outputs; W, BITS and PARTS as in `ladimo.model.kernels.dequantize`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.kernels.dequantize import load_columns, load_elements, stored, widen
from ladimo.model.kernels.early_launch import early_launch, wait_for_inputs
from ladimo.model.kernels.tiles import Tile
from ladimo.model.quantization import QuantizedWeights, Weights

# From this many rows on, unpacking the weights once should take less time than unpacking them for every block of rows.
# Estimated from bytes and operations; not measured yet.
WHOLE_ROWS = 256
MATVEC_TILE = Tile(1, 4, 1024, num_warps=4)  # on an H100, 11.5 us for 4096 x 4096 in bf16, where cuBLAS takes 16.6
FEW_OUTPUTS = 4 * 132  # below, four rows per program would leave multiprocessors of an H100 without work
FEW_OUTPUTS_TILE = Tile(1, 1, 2048, num_warps=4)
INTEGER_MATVEC_TILE = Tile(1, 4, 512, num_warps=4)  # like `experts.INTEGER_MATVEC_TILES`
WHOLE_TILE = Tile(1, 8, 256, num_warps=4)


def matvec_tile(num_outputs: int, integers: bool) -> Tile:
    """The tile for a product of one row."""
    if integers:
        return INTEGER_MATVEC_TILE
    return FEW_OUTPUTS_TILE if num_outputs < FEW_OUTPUTS else MATVEC_TILE


def matmul_tile(num_rows: int) -> Tile:
    """The tile for a product of this many rows."""
    if num_rows <= 16:
        return Tile(16, 32, 128, num_warps=4, num_stages=4)
    if num_rows <= 32:
        return Tile(32, 32, 128, num_warps=4, num_stages=4)
    return Tile(64, 64, 64, num_warps=4, num_stages=4)


def linear(x: Tensor, weights: Weights, bias: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """x [..., K] -> [..., N]. See the reference. `tile` replaces the default choice, which depends on the number of rows."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    num_rows, num_inputs = rows.shape
    if isinstance(weights, Tensor):
        if num_rows != 1 or not weights.is_contiguous():
            return F.linear(x, weights, bias)
    elif num_rows >= WHOLE_ROWS:
        return F.linear(x, whole(weights, x.dtype), bias)
    num_outputs = weights.shape[0]
    out = x.new_empty(num_rows, num_outputs)
    elements, scales, form = stored(weights)
    sizes = {"K": num_inputs, "N": num_outputs, **form}
    if num_rows == 1:
        tile = tile or matvec_tile(num_outputs, integers=not isinstance(weights, Tensor))
        _matvec_kernel[(triton.cdiv(num_outputs, tile.n),)](
            rows,
            elements,
            scales,
            bias,
            out,
            **sizes,
            BLOCK_N=tile.n,
            BLOCK=tile.k,
            num_warps=tile.num_warps,
            **early_launch(),
        )
    else:
        tile = tile or matmul_tile(num_rows)
        _matmul_kernel[(triton.cdiv(num_outputs, tile.n), triton.cdiv(num_rows, tile.m))](
            rows,
            elements,
            scales,
            bias,
            out,
            num_rows,
            **sizes,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK=tile.k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **early_launch(),
        )
    return out.view(*x.shape[:-1], num_outputs)


def whole(weights: QuantizedWeights, dtype: torch.dtype) -> Tensor:
    """Unpack the weights [N, K] to `dtype`. Reference: `QuantizedWeights.to_dtype`."""
    num_outputs, num_inputs = weights.shape
    out = torch.empty(num_outputs, num_inputs, dtype=dtype, device=weights.data.device)
    elements, scales, form = stored(weights)
    tile = WHOLE_TILE
    _whole_kernel[(triton.cdiv(num_outputs, tile.n), triton.cdiv(form["W"], tile.k))](
        elements,
        scales,
        out,
        K=num_inputs,
        N=num_outputs,
        **form,
        BLOCK_N=tile.n,
        BLOCK=tile.k,
        num_warps=tile.num_warps,
        **early_launch(),
    )
    return out


@triton.jit
def _matvec_kernel(
    x_ptr,
    elements_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[n..n+BLOCK_N] for a single row."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(columns, N - 1).to(tl.int64)[:, None]  # a partial last block reads the last row again
    inner = tl.arange(0, BLOCK)[None, :]
    element_ptrs = elements_ptr + rows * W + inner
    x_ptrs = x_ptr + tl.zeros([BLOCK_N, 1], dtype=tl.int32) + inner
    first = tl.load(element_ptrs, mask=inner < W, other=0)
    second = tl.load(element_ptrs + BLOCK, mask=BLOCK + inner < W, other=0)
    wait_for_inputs(EARLY)
    acc = tl.zeros([BLOCK_N, BLOCK], dtype=tl.float32)
    for start in tl.static_range(0, W, BLOCK):
        if start == 0:
            elements = first
        elif start == BLOCK:
            elements = second
        else:
            elements = tl.load(element_ptrs + start, mask=start + inner < W, other=0)
        for part in tl.static_range(PARTS):
            x = tl.load(x_ptrs + part * W + start, mask=part * W + start + inner < K, other=0.0).to(tl.float32)
            acc += x * widen(elements, scales_ptr, rows, start, W, BITS, part, 1).to(tl.float32)
    out = tl.sum(acc, axis=1)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=columns < N)


@triton.jit(do_not_specialize=["num_rows"])
def _matmul_kernel(
    x_ptr,
    elements_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    K: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[m..m+BLOCK_M, n..n+BLOCK_N] of the product."""
    wait_for_inputs(EARLY)
    places = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = places < num_rows
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(columns, N - 1).to(tl.int64)[None, :]
    inner = tl.arange(0, BLOCK)
    x_ptrs = x_ptr + places[:, None].to(tl.int64) * K + inner[None, :]
    element_ptrs = elements_ptr + rows * W + inner[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    even: tl.constexpr = K % (PARTS * BLOCK) == 0
    for start in range(0, W, BLOCK):
        elements = load_elements(element_ptrs, start, inner, W, even)
        for part in tl.static_range(PARTS):
            x = load_columns(x_ptrs, part * W + start, inner, live, K, even)
            weights = widen(elements, scales_ptr, rows, start, W, BITS, part, 0).to(x.dtype)
            acc = tl.dot(x, weights, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + places[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & (columns < N)[None, :])


@triton.jit
def _whole_kernel(
    elements_ptr,
    scales_ptr,
    out_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Unpack BLOCK stored elements in each of BLOCK_N rows."""
    wait_for_inputs(EARLY)
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    live = rows < N
    rows = tl.minimum(rows, N - 1)
    start = tl.program_id(1) * BLOCK
    inner = start + tl.arange(0, BLOCK)[None, :]
    elements = tl.load(elements_ptr + rows * W + inner, mask=inner < W, other=0)
    for part in tl.static_range(PARTS):
        weights = widen(elements, scales_ptr, rows, start, W, BITS, part, 1)
        columns = part * W + inner
        mask = live & (inner < W) & (columns < K)
        tl.store(out_ptr + rows * K + columns, weights.to(out_ptr.dtype.element_ty), mask=mask)
