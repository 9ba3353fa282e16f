"""Reading planes of nested weights inside kernels. `ladimo.model.nested.plane_layout` defines how they lie in memory.

A tile of a product is [N, M]: N rows of weights times M tokens. So the weights are the left factor, which the matrix units take
from registers, where they were unpacked. A few tokens fill up a tile's narrow side.

Legend: K inputs, BLOCKS of 256 columns per row of a plane.
"""

import triton
import triton.language as tl

from ladimo.model.nested.plane_layout import BLOCK_COLUMNS
from ladimo.model.nested.plane_layout import HALF_GROUPS as GROUPS_PER_HALF
from ladimo.model.nested.weights import STEPS as LOW_STEPS
from ladimo.model.precision import GROUP as COLUMNS_PER_SCALE

GROUP = tl.constexpr(COLUMNS_PER_SCALE)  # also the words of a block
HALF_GROUPS = tl.constexpr(GROUPS_PER_HALF)
BLOCK = tl.constexpr(BLOCK_COLUMNS)
STEPS = tl.constexpr(LOW_STEPS)
# Up to so many tokens, scales multiply the sums of a group instead of its weights, because there are fewer of these.
SCALED_SUMS = tl.constexpr(32)
COUNT_TILE = tl.constexpr(256)


@triton.jit
def integers(nibbles, dtype: tl.constexpr):
    """Numbers of `dtype` for nibbles that hold an integer plus 8 each: int16, or int32 with two 16-bit halves per word.

    Those of a word become neighbours in the last dimension."""
    # 0x4300 is 128 in bf16, and the last bit of a bf16 between 128 and 256 is worth 1. A conversion would take longer.
    exact: tl.constexpr = dtype == tl.bfloat16
    if nibbles.dtype == tl.int32:
        if exact:
            nibbles = nibbles | 0x43004300
        nibbles = tl.join(nibbles.to(tl.int16), (nibbles >> 16).to(tl.int16))
        nibbles = tl.reshape(nibbles, (nibbles.shape[0], 2 * nibbles.shape[1]))
    elif exact:
        nibbles = nibbles | 0x4300
    return nibbles.to(tl.bfloat16, bitcast=True) - 136.0 if exact else (nibbles - 8).to(dtype)


@triton.jit
def add_plane(
    acc,
    x_ptrs,
    live,
    words_ptr,
    scales_ptr,
    high_ptr,
    rows,
    wanted,
    begin,
    end,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """acc [N, M] plus the products of `rows` [N, 1] of a plane and tokens, over the blocks begin .. end of columns.

    `x_ptrs` [1, M] point to the tokens' first column, of which those in `live` [1, M] exist. EVEN: whole blocks have no columns
    from K on. With CHOSEN, only rows that are `wanted` [N, 1] are read; the others add zeros. With `high_ptr` it is the sum of
    two planes: of the low plane `words_ptr`, whose scales are given, and of the high plane `high_ptr`.
    """
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    few: tl.constexpr = acc.shape[1] <= SCALED_SUMS
    words_of_half: tl.constexpr = GROUP // 2
    inner = tl.arange(0, GROUP)
    word_places = rows * (BLOCKS * GROUP) + tl.arange(0, words_of_half)[None, :]
    scale_ptrs = scales_ptr + rows * (BLOCKS * 2 * HALF_GROUPS)
    for block in range(begin, end):
        for half in tl.static_range(2):
            at = word_places + (block * GROUP + half * words_of_half)
            words = tl.load(words_ptr + at, mask=wanted, other=0) if CHOSEN else tl.load(words_ptr + at)
            if high_ptr is not None:
                high_words = tl.load(high_ptr + at)
            for group in tl.static_range(HALF_GROUPS):
                place = (block * 2 + half) * HALF_GROUPS + group
                columns = place * GROUP + inner[:, None]
                if EVEN:
                    x = tl.load(x_ptrs + columns, mask=live, other=0.0)
                else:
                    x = tl.load(x_ptrs + columns, mask=live & (columns < K), other=0.0)
                scales = tl.load(scale_ptrs + place, mask=wanted, other=0.0) if CHOSEN else tl.load(scale_ptrs + place)
                weights = integers((words >> (4 * group)) & 0x000F000F, dtype)
                if high_ptr is not None:
                    weights += integers((high_words >> (4 * group)) & 0x000F000F, dtype) * STEPS
                if few:
                    acc += tl.dot(weights, x, input_precision="ieee") * scales.to(tl.float32)
                else:
                    acc = tl.dot(weights * scales.to(dtype), x, acc, input_precision="ieee")
    return acc


@triton.jit
def add_whole(acc, x_ptrs, live, weights_ptr, rows, begin, end, K: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr):
    """As `add_plane`, with whole weights [rows, K], over the blocks begin .. end of columns, STEP columns at a time."""
    inner = tl.arange(0, STEP)
    weight_ptrs = weights_ptr + rows * K + inner[None, :]
    for start in range(begin * BLOCK, tl.minimum(end * BLOCK, K), STEP):
        columns = start + inner[:, None]
        if EVEN:
            x = tl.load(x_ptrs + columns, mask=live, other=0.0)
            weights = tl.load(weight_ptrs + start)
        else:
            x = tl.load(x_ptrs + columns, mask=live & (columns < K), other=0.0)
            weights = tl.load(weight_ptrs + start, mask=(start + inner < K)[None, :], other=0.0)
        acc = tl.dot(weights, x, acc, input_precision="ieee")
    return acc


@triton.jit
def bits_of_tokens(bits_ptr, stride, tokens, live, HAS_WHOLE: tl.constexpr):
    """How many bits tokens [M] read: 4, 8 or 16, and 0 for padding. Without whole weights at most 8."""
    bits = tl.load(bits_ptr + tokens * stride, mask=live, other=0.0).to(tl.float32)
    more: tl.constexpr = 16 if HAS_WHOLE else 8
    return tl.where(bits <= 0, 0, tl.where(bits <= 4, 4, tl.where(bits <= 8, 8, more)))


@triton.jit
def tokens_that_refine(bits, refine_ptr, stride, tokens, live):
    """Which tokens refine what they read at 4 bits, and their REFINE."""
    refine = tl.load(refine_ptr + tokens * stride, mask=live, other=float("inf"))
    return (bits == 4) & (refine < float("inf")), refine


@triton.jit
def runs_expert(ids_ptr, tokens, live, expert, PLACES: tl.constexpr, BLOCK_PLACES: tl.constexpr):
    """Which of the tokens [M] chose the expert. ids_ptr None: all."""
    if ids_ptr is None:
        runs = live
    else:
        places = tl.arange(0, BLOCK_PLACES)[None, :]
        mask = live[:, None] & (places < PLACES)
        ids = tl.load(ids_ptr + tokens[:, None] * PLACES + places, mask=mask, other=-1)
        runs = tl.max((ids == expert).to(tl.int32), axis=1) > 0
    return runs


@triton.jit
def count_chosen(chosen_ptr, first, counts, N: tl.constexpr, GROUPS: tl.constexpr, PER_PROGRAM: tl.constexpr):
    """The groups first .. first + PER_PROGRAM, and how many bytes of each are set; 0 unless `counts`.

    N bytes belong to GROUPS groups: byte n to group n * GROUPS // N.
    """
    groups = first + tl.arange(0, PER_PROGRAM)
    begin = (groups * N + GROUPS - 1) // GROUPS
    end = ((groups + 1) * N + GROUPS - 1) // GROUPS
    found = tl.zeros([PER_PROGRAM, COUNT_TILE], dtype=tl.int32)
    for start in range(0, (N + GROUPS - 1) // GROUPS, COUNT_TILE):
        places = begin[:, None] + start + tl.arange(0, COUNT_TILE)[None, :]
        mask = (places < end[:, None]) & (groups < GROUPS)[:, None] & counts
        found += tl.load(chosen_ptr + places, mask=mask, other=0).to(tl.int32)
    return groups, tl.sum(found, axis=1).to(tl.int64)
