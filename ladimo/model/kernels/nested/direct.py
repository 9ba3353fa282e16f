"""The product with nested weights for up to eight tokens, as `ladimo.model.kernels.nested.linear` defines it.

A program is one warp and computes 16 rows. Weights and x go from memory straight to the registers in which the matrix units
take them, 16 bytes per lane, because the columns of a group are reordered alike in both (`unit_order`). Nothing goes through
shared memory and no warp waits for another. The next half of a block is loaded as soon as one was used, so that reading never
stops. On an H100 this reads 4-bit planes at 1.4 to 1.9 times the speed of the tiles for more tokens. With more tokens, x takes
more registers than there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladimo.model.kernels.early_launch import early_launch, wait_for_inputs
from ladimo.model.kernels.nested.planes import BLOCK, GROUP, HALF_GROUPS, bits_of_tokens, integers, runs_expert
from ladimo.model.nested.plane_layout import BLOCK_COLUMNS
from ladimo.model.nested.weights import NestedWeights

MOST_TOKENS = 8
ROWS = 16  # of a program
# Columns are divided among programs as long as there are at most so many and each has at least so many blocks of columns.
# Measured on an H100, 16 for each multiprocessor.
MOST_PROGRAMS = 2112
LEAST_BLOCKS = 4
# With more registers than it takes by itself, the compiler keeps more loads on their way. That pays where one program after the
# other fills a multiprocessor (22,016 rows: 24.7 us instead of 29.4), and not otherwise (4,096 rows: 16.1 instead of 13.9).
MANY_ROWS = 8448
REGISTERS_FOR_MANY_ROWS = 144

# The neighbouring columns that a lane holds for the matrix units: of planes, and of whole weights.
PLANE_LANE, WHOLE_LANE = tl.constexpr(4), tl.constexpr(2)
M = tl.constexpr(MOST_TOKENS)
N = tl.constexpr(ROWS)


def num_parts(rows: int, blocks: int) -> int:
    """Among how many programs the columns of each tile are divided."""
    tiles, parts = triton.cdiv(rows, ROWS), 1
    while 2 * parts * tiles <= MOST_PROGRAMS and triton.cdiv(blocks, 2 * parts) >= LEAST_BLOCKS:
        parts *= 2
    return parts


def product(
    x: Tensor,
    weights: NestedWeights,
    bits: Tensor,
    ids: Tensor | None,
    places: dict[str, int],
    outputs: int,
    inputs: int,
) -> Tensor:
    """The parts [P, T, R], or [P, T, E, R] of several outputs. `outputs` and `inputs`: the experts whose products are apart and
    those whose products are summed. The other arguments are those of `linear.product`."""
    (rows, columns), high, low = weights.shape[-2:], weights.high, weights.low
    assert len(x) <= MOST_TOKENS and high.scales.dtype == torch.bfloat16
    blocks = high.data.shape[-1] * 8 // BLOCK_COLUMNS
    parts = num_parts(outputs * rows, blocks)
    shape = (parts, len(x), rows) if outputs == 1 else (parts, len(x), outputs, rows)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    options = early_launch()
    _direct_kernel[(outputs * triton.cdiv(rows, ROWS), parts)](
        x,
        bits,
        bits.stride(0),
        ids,
        high.data,
        high.scales,
        low.data,
        low.scales,
        weights.full,
        out,
        len(x),
        K=columns,
        R=rows,
        BLOCKS=blocks,
        EVEN=columns % BLOCK_COLUMNS == 0,
        PART_BLOCKS=triton.cdiv(blocks, parts),
        OUTPUTS=outputs,
        INPUTS=inputs,
        **places,
        num_warps=1,
        num_stages=1,
        maxnreg=REGISTERS_FOR_MANY_ROWS if outputs * rows >= MANY_ROWS else None,
        **options,
        ASSEMBLY=options["EARLY"] and x.dtype == torch.bfloat16,
    )
    return out


@triton.jit
def unit_order(tile, LANE: tl.constexpr):
    """Columns of [rows, 32] or [rows, 16, 2] from the order in memory (four lanes, 8 each) to that of the matrix units'
    registers.

    Nothing moves: it tells the compiler that the lanes' registers are right as they are, for both factors alike."""
    if LANE == 4:  # a multiplication takes neighbouring registers
        tile = tl.reshape(tile, (tile.shape[0], 4, 2, 2, 2))
        tile = tl.permute(tile, (0, 3, 1, 2, 4))
    else:
        tile = tl.reshape(tile, (tile.shape[0], 4, 4, 2))
        tile = tl.permute(tile, (0, 2, 1, 3))
    return tl.reshape(tile, (tile.shape[0], GROUP))


@triton.jit
def group_weights(words, group: tl.constexpr, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The integers of a group [N, 32] of words [N, 16], in the order of the matrix units. See `planes.integers`.

    ASSEMBLY: in one instruction where the compiler would take two."""
    if ASSEMBLY:
        pairs = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, c;
            mov.b32 c, 0xC308C308;
            lop3.b32 t, $1, 0x000F000F, 0x43004300, 0xEA;
            add.rn.bf16x2 $0, t, c;
            }""",
            "=r,r",
            [words >> (4 * group)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        pairs = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(tl.bfloat16, bitcast=True)
    else:
        pairs = integers((words >> (4 * group)) & 0x000F000F, dtype)
    return unit_order(pairs, PLANE_LANE)


@triton.jit
def x_tile(x_ptrs, column, K: tl.constexpr, EVEN: tl.constexpr):
    columns = column + tl.arange(0, GROUP)[None, :]
    return tl.load(x_ptrs + columns) if EVEN else tl.load(x_ptrs + columns, mask=columns < K, other=0.0)


@triton.jit
def load_half(word_ptrs, scale_ptrs, half, end):
    """Words [N, 16] of a half block, and its four scales of each row as int64 [N, 1]; none from `end` on."""
    there = half < end
    words = tl.load(word_ptrs + half * (GROUP // 2), mask=there, cache_modifier=".cg")
    return words, tl.load(scale_ptrs + half, mask=there)


@triton.jit
def add_half(acc, words, scales, x_ptrs, half, K: tl.constexpr, EVEN: tl.constexpr, ASSEMBLY: tl.constexpr):
    start = half * (HALF_GROUPS * GROUP)
    x_0 = x_tile(x_ptrs, start, K, EVEN)
    x_1 = x_tile(x_ptrs, start + GROUP, K, EVEN)
    x_2 = x_tile(x_ptrs, start + 2 * GROUP, K, EVEN)
    x_3 = x_tile(x_ptrs, start + 3 * GROUP, K, EVEN)
    for group in tl.static_range(HALF_GROUPS):
        x = x_0 if group == 0 else x_1 if group == 1 else x_2 if group == 2 else x_3
        weights = group_weights(words, group, x.dtype, ASSEMBLY)
        two = (scales >> (32 * (group // 2))).to(tl.int32)
        scale = (two << 16 if group % 2 == 0 else two & -65536).to(tl.float32, bitcast=True)
        acc += tl.dot(weights, tl.trans(unit_order(x, PLANE_LANE)), input_precision="ieee") * scale
    return acc


@triton.jit
def add_plane(
    acc,
    x_ptrs,
    words_ptr,
    scales_ptr,
    rows,
    begin,
    end,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """acc [N, M] plus the products of `rows` [N, 1] and the tokens at `x_ptrs` [M, 1], over the blocks begin .. end."""
    word_ptrs = words_ptr + rows * (BLOCKS * GROUP) + tl.arange(0, GROUP // 2)[None, :]
    scale_ptrs = scales_ptr.to(tl.pointer_type(tl.int64), bitcast=True) + rows * (BLOCKS * 2)
    first, last = begin * 2, end * 2
    words_0, scales_0 = load_half(word_ptrs, scale_ptrs, first, last)
    words_1, scales_1 = load_half(word_ptrs, scale_ptrs, first + 1, last)
    for half in range(first, last, 2):
        acc = add_half(acc, words_0, scales_0, x_ptrs, half, K, EVEN, ASSEMBLY)
        words_0, scales_0 = load_half(word_ptrs, scale_ptrs, half + 2, last)
        acc = add_half(acc, words_1, scales_1, x_ptrs, half + 1, K, EVEN, ASSEMBLY)
        words_1, scales_1 = load_half(word_ptrs, scale_ptrs, half + 3, last)
    return acc


@triton.jit
def load_whole(weight_ptrs, start, end, EVEN: tl.constexpr):
    """Whole weights [N, 32] twice, of 64 columns; zeros from `end` on, or anything if EVEN."""
    inner = tl.arange(0, GROUP)[None, :]
    if EVEN:
        there = start < end
        first = tl.load(weight_ptrs + start, mask=there, cache_modifier=".cg")
        return first, tl.load(weight_ptrs + start + GROUP, mask=there, cache_modifier=".cg")
    first = tl.load(weight_ptrs + start, mask=start + inner < end, other=0.0, cache_modifier=".cg")
    second = tl.load(weight_ptrs + start + GROUP, mask=start + GROUP + inner < end, other=0.0, cache_modifier=".cg")
    return first, second


@triton.jit
def add_two(acc, first, second, x_ptrs, start, K: tl.constexpr, EVEN: tl.constexpr):
    x = tl.trans(unit_order(x_tile(x_ptrs, start, K, EVEN), WHOLE_LANE))
    acc = tl.dot(unit_order(first, WHOLE_LANE), x, acc, input_precision="ieee")
    x = tl.trans(unit_order(x_tile(x_ptrs, start + GROUP, K, EVEN), WHOLE_LANE))
    return tl.dot(unit_order(second, WHOLE_LANE), x, acc, input_precision="ieee")


@triton.jit
def add_whole(acc, x_ptrs, weights_ptr, rows, begin, end, K: tl.constexpr, EVEN: tl.constexpr):
    """As `add_plane`, with whole weights [rows, K]: 64 columns twice are on their way."""
    weight_ptrs = weights_ptr + rows * K + tl.arange(0, GROUP)[None, :]
    first = begin * BLOCK
    last = tl.minimum(end * BLOCK, K)
    a, b = load_whole(weight_ptrs, first, last, EVEN)
    c, d = load_whole(weight_ptrs, first + 2 * GROUP, last, EVEN)
    for start in range(first, last, 4 * GROUP):
        acc = add_two(acc, a, b, x_ptrs, start, K, EVEN)
        a, b = load_whole(weight_ptrs, start + 4 * GROUP, last, EVEN)
        acc = add_two(acc, c, d, x_ptrs, start + 2 * GROUP, K, EVEN)
        c, d = load_whole(weight_ptrs, start + 6 * GROUP, last, EVEN)
    return acc


@triton.jit(do_not_specialize=["num_tokens", "bits_stride"])
def _direct_kernel(
    x_ptr,
    bits_ptr,
    bits_stride,
    ids_ptr,
    high_ptr,
    high_scales_ptr,
    low_ptr,
    low_scales_ptr,
    whole_ptr,
    out_ptr,
    num_tokens,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    PART_BLOCKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One part of out[t, expert, n..n+N] for all tokens t."""
    wait_for_inputs(EARLY)
    row_tiles: tl.constexpr = (R + N - 1) // N
    expert = tl.program_id(0) // row_tiles
    columns = (tl.program_id(0) % row_tiles) * N + tl.arange(0, N)
    places = tl.arange(0, M)
    live = places < num_tokens
    tokens = places.to(tl.int64)
    begin = tl.program_id(1) * PART_BLOCKS
    end = tl.minimum(begin + PART_BLOCKS, BLOCKS)
    bits = bits_of_tokens(bits_ptr, bits_stride, tokens, live, whole_ptr is not None)

    high = tl.zeros([N, M], dtype=tl.float32)
    low = tl.zeros([N, M], dtype=tl.float32)
    whole = tl.zeros([N, M], dtype=tl.float32)
    for section in range(INPUTS):
        number = expert + section
        wanted = tl.where(runs_expert(ids_ptr, tokens, live, number, PLACES, BLOCK_PLACES), bits, 0)
        # Partial last tiles read the last row and the last token again.
        rows = number.to(tl.int64) * R + tl.minimum(columns, R - 1)[:, None]
        x_ptrs = x_ptr + (tl.minimum(tokens, num_tokens - 1) * INPUTS + section)[:, None] * K
        wants_4 = tl.max((wanted == 4).to(tl.int32), axis=0) > 0
        wants_8 = tl.max((wanted == 8).to(tl.int32), axis=0) > 0
        if wants_4 or wants_8:
            high = add_plane(high, x_ptrs, high_ptr, high_scales_ptr, rows, begin, end, K, BLOCKS, EVEN, ASSEMBLY)
        if wants_8:
            low = add_plane(low, x_ptrs, low_ptr, low_scales_ptr, rows, begin, end, K, BLOCKS, EVEN, ASSEMBLY)
        if whole_ptr is not None and tl.max((wanted > 8).to(tl.int32), axis=0) > 0:
            whole = add_whole(whole, x_ptrs, whole_ptr, rows, begin, end, K, EVEN)
    out = tl.where(bits == 4, high, tl.where(bits == 8, high + low, tl.where(bits == 0, 0.0, whole)))
    out_ptrs = out_ptr + (((tl.program_id(1) * num_tokens + tokens) * OUTPUTS + expert) * R)[None, :] + columns[:, None]
    tl.store(out_ptrs, out, mask=live[None, :] & (columns < R)[:, None])
