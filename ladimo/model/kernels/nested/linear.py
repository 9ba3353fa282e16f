"""Products with nested weights, in which every token has its own number of bits. Reference: `TorchBackend.nested_linear`.

Per token:  4 bits: H x     8 bits: H x + L x     whole: W x     padding: nothing

H, L and W are the high plane, the low plane and the whole weights. A program computes one tile of rows and tokens. It runs up
to three loops over the columns, one for each of H, L and W, and skips those that no token of its tile wants. It finds that out
on the device, from the tokens' bits. So a mixed batch reads each plane once per tile, and a plane that nobody wants not at all.
With many tokens, where multiplications take the time and not reading, H + L is one product, of weights summed as they are read.

A token's numbers do not depend on the other tokens of its batch. Each token has a column of sums of its own; columns go up in a
fixed order; what another token wants is added to sums that this one does not use. Where columns are divided among programs,
their sums are added in order, and how they are divided depends on the shape of the weights and the number of tiles. Up to eight
tokens have a kernel of their own (`direct`). More, up to `DECODE_TOKENS`, are one tile. So a token has the same numbers in all
batches of up to 8, and in all of 9 to 32.

Legend: T tokens, K inputs, R rows (outputs), E experts, as in `ladimo.model.kernels.nested.planes`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladimo.model.kernels.early_launch import early_launch, wait_for_inputs
from ladimo.model.kernels.nested import direct
from ladimo.model.kernels.nested.planes import add_plane, add_whole, bits_of_tokens, runs_expert
from ladimo.model.kernels.tiles import Tile
from ladimo.model.nested.plane_layout import BLOCK_COLUMNS
from ladimo.model.nested.weights import NestedWeights

DECODE_TOKENS = 32
# Columns are divided among programs as long as there are at most so many (six for each of 132 multiprocessors, which fit there
# at the same time) and each has at least so many blocks of columns. On an H100, half as many or twice as many were not faster.
MOST_PROGRAMS = 792
# From this many rows on, a program of decoding computes 64 of them with four warps: 22,016 rows take 46 us instead of 56 for 32
# tokens on an H100. Where there are fewer rows, such programs leave multiprocessors without work.
MANY_ROWS = 64 * 132
LEAST_BLOCKS = 4
FINISH_TILE = 1024


def tile_for(rows: int, few: bool) -> Tile:
    """m tokens times n of `rows` rows; k columns of whole weights at a time.

    `few`: the tiles of decoding. They have 32 tokens, whatever their number. So the matrix units' instructions are the same,
    and with them a token's numbers.
    """
    if few and rows >= MANY_ROWS:
        return Tile(32, 64, 128, num_warps=4, num_stages=3)
    if few:
        return Tile(32, 32, 128, num_warps=2, num_stages=3)
    return Tile(64, 64, 64, num_warps=4, num_stages=2)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the tokens of a step want: bits [T] (of any stride), and the experts that they chose, ids [T, K] (-1 = none)."""

    bits: Tensor
    ids: Tensor | None = None

    @property
    def places(self) -> dict[str, int]:
        """The constants of a kernel that reads `ids`."""
        places = 1 if self.ids is None else self.ids.shape[1]
        return {"PLACES": places, "BLOCK_PLACES": triton.next_power_of_2(places)}


def linear(
    x: Tensor, weights: NestedWeights, bits: Tensor, bias: Tensor | None = None, decode_tokens: int = DECODE_TOKENS
) -> Tensor:
    """x [T, K] at each token's bits [T] -> [T, R]. See the reference. The planes are in words (`plane_layout`). Up to
    `decode_tokens` tokens are computed in the tiles of decoding."""
    num_tokens, num_outputs = len(x), weights.shape[0]
    parts = product(x, weights, Tokens(bits), num_tokens <= decode_tokens)
    out = x.new_empty(num_tokens, num_outputs)
    block = min(FINISH_TILE, triton.next_power_of_2(num_outputs))
    _sum_kernel[(num_tokens, triton.cdiv(num_outputs, block))](
        parts, bias, out, num_tokens, N=num_outputs, PARTS=len(parts), BLOCK=block, **early_launch()
    )
    return out


def product(
    x: Tensor,
    weights: NestedWeights,
    tokens: Tokens,
    few: bool,
    sum_experts: bool = False,
) -> Tensor:
    """Products in fp32, in parts that are still to be added. Each part covers some of the columns. `few`: see `tile_for`.

    Matrices [R, K] take x [T, K], and matrices [E, R, K] give every token's products with the experts that it chose: parts
    [P, T, E, R], without values where it did not choose one. With `sum_experts`, x is [T, E, K], zeros where an expert was not
    chosen, and the products are summed: parts [P, T, R].
    """
    x = x.contiguous()
    num_tokens = len(x)
    num_experts, (rows, columns) = (weights.shape[0] if len(weights.shape) == 3 else 1), weights.shape[-2:]
    high, low = weights.high, weights.low
    outputs, inputs = (1, num_experts) if sum_experts else (num_experts, 1)
    if few and num_tokens <= direct.MOST_TOKENS:
        return direct.product(x, weights, tokens.bits, tokens.ids, tokens.places, outputs, inputs)
    tile = tile_for(outputs * rows, few)
    blocks = high.data.shape[-1] * 8 // BLOCK_COLUMNS
    row_tiles = outputs * triton.cdiv(rows, tile.n)
    token_tiles = triton.cdiv(num_tokens, tile.m)
    parts = num_parts(row_tiles * token_tiles, blocks)
    shape = (parts, num_tokens, rows) if outputs == 1 else (parts, num_tokens, outputs, rows)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    _product_kernel[(row_tiles, token_tiles, parts)](
        x,
        tokens.bits,
        tokens.bits.stride(0),
        tokens.ids,
        high.data,
        high.scales,
        low.data,
        low.scales,
        weights.full,
        out,
        num_tokens,
        K=columns,
        R=rows,
        BLOCKS=blocks,
        EVEN=columns % BLOCK_COLUMNS == 0,
        PART_BLOCKS=triton.cdiv(blocks, parts),
        OUTPUTS=outputs,
        INPUTS=inputs,
        **tokens.places,
        FEW=few,
        M=tile.m,
        N=tile.n,
        STEP=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **early_launch(),
    )
    return out


def num_parts(tiles: int, blocks: int) -> int:
    """Among how many programs the columns of each tile are divided."""
    parts = 1
    while 2 * parts * tiles <= MOST_PROGRAMS and triton.cdiv(blocks, 2 * parts) >= LEAST_BLOCKS:
        parts *= 2
    return parts


@triton.jit(do_not_specialize=["num_tokens", "bits_stride"])
def _product_kernel(
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
    FEW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One part of out[t, expert, n..n+N] for M tokens t."""
    wait_for_inputs(EARLY)
    row_tiles: tl.constexpr = (R + N - 1) // N
    expert = tl.program_id(0) // row_tiles
    columns = (tl.program_id(0) % row_tiles) * N + tl.arange(0, N)
    places = tl.program_id(1) * M + tl.arange(0, M)
    live = places < num_tokens
    tokens = places.to(tl.int64)
    begin = tl.program_id(2) * PART_BLOCKS
    end = tl.minimum(begin + PART_BLOCKS, BLOCKS)
    bits = bits_of_tokens(bits_ptr, bits_stride, tokens, live, whole_ptr is not None)

    high = tl.zeros([N, M], dtype=tl.float32)
    low = tl.zeros([N, M], dtype=tl.float32)
    whole = tl.zeros([N, M], dtype=tl.float32)
    for section in range(INPUTS):
        number = expert + section
        wanted = tl.where(runs_expert(ids_ptr, tokens, live, number, PLACES, BLOCK_PLACES), bits, 0)
        # A partial last tile reads the last row again.
        rows = number.to(tl.int64) * R + tl.minimum(columns, R - 1)[:, None]
        x_ptrs = x_ptr + (tokens * INPUTS + section)[None, :] * K
        mask = live[None, :]
        wants_4 = tl.max((wanted == 4).to(tl.int32), axis=0) > 0
        wants_8 = tl.max((wanted == 8).to(tl.int32), axis=0) > 0
        if wants_4 or (FEW and wants_8):
            high = add_plane(
                high, x_ptrs, mask, high_ptr, high_scales_ptr, None, rows, None, begin, end, K, BLOCKS, EVEN, False
            )
        if wants_8:
            upper = None if FEW else high_ptr
            low = add_plane(low, x_ptrs, mask, low_ptr, low_scales_ptr, upper, rows, None, begin, end, K, BLOCKS, EVEN, False)
        if whole_ptr is not None and tl.max((wanted > 8).to(tl.int32), axis=0) > 0:
            whole = add_whole(whole, x_ptrs, mask, whole_ptr, rows, begin, end, K, STEP, EVEN)
    at_8 = high + low if FEW else low
    out = tl.where(bits == 4, high, tl.where(bits == 8, at_8, tl.where(bits == 0, 0.0, whole)))
    out_ptrs = out_ptr + (((tl.program_id(2) * num_tokens + tokens) * OUTPUTS + expert) * R)[None, :] + columns[:, None]
    tl.store(out_ptrs, out, mask=live[None, :] & (columns < R)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_kernel(
    parts_ptr, bias_ptr, out_ptr, num_tokens, N: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """out[t, n..n+BLOCK] = the sum of the parts in order, plus bias."""
    wait_for_inputs(EARLY)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < N
    out = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(PARTS):
        out += tl.load(parts_ptr + (part * num_tokens + token) * N + columns, mask=live, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + columns, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * N + columns, out.to(out_ptr.dtype.element_ty), mask=live)
