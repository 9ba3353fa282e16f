"""Lists of tokens by expert, and blocks of equal size cut from them: what grouped products run over.

Legend: E experts, K places per token.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens"])
def list_kernel(
    ids_ptr,
    weights_ptr,
    counts_ptr,
    lists_ptr,
    list_weights_ptr,
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per list: the numbers of its tokens, ascending, and how many they are. List e is of the tokens that chose
    expert e; list E + e of those among them that did not choose all; list 2E of those that did."""
    index = tl.program_id(0)
    expert = index % E
    places = tl.arange(0, BLOCK_PLACES)
    count = 0
    for start in range(0, num_tokens, TILE):
        tokens = start + tl.arange(0, TILE)
        live = (tokens < num_tokens)[:, None] & (places < K)[None, :]
        ids = tl.load(ids_ptr + tokens[:, None] * K + places[None, :], mask=live, other=-1)
        chosen = ids == expert
        takes_all = tl.sum((ids >= 0).to(tl.int32), axis=1) == E
        takes_it = tl.max(chosen.to(tl.int32), axis=1) > 0
        in_list = takes_it & ((index < E) | (takes_all == (index == 2 * E)))
        position = count + tl.cumsum(in_list.to(tl.int32), axis=0) - 1
        tl.store(lists_ptr + index * num_tokens + position, tokens, mask=in_list)
        weights = tl.load(weights_ptr + tokens[:, None] * K + places[None, :], mask=live, other=0.0)
        weights = tl.sum(tl.where(chosen, weights, 0.0), axis=1)
        tl.store(list_weights_ptr + index * num_tokens + position, weights, mask=in_list & (index < E))
        count += tl.sum(in_list.to(tl.int32), axis=0)
    tl.store(counts_ptr + index, count)


@triton.jit
def find_block(counts_ptr, block, LISTS: tl.constexpr, BLOCK_LISTS: tl.constexpr, M: tl.constexpr):
    """Which list the block-th block of M tokens belongs to (LISTS: none), its first place there, the list's length."""
    lists = tl.arange(0, BLOCK_LISTS)
    counts = tl.load(counts_ptr + lists, mask=lists < LISTS, other=0)
    blocks = (counts + M - 1) // M
    ends = tl.cumsum(blocks, axis=0)
    index = tl.sum(((ends <= block) & (lists < LISTS)).to(tl.int32), axis=0)
    begin = tl.sum(tl.where(lists == index, ends - blocks, 0), axis=0)
    return index, (block - begin) * M, tl.sum(tl.where(lists == index, counts, 0), axis=0)
