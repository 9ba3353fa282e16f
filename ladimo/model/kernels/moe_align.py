"""Lists of tokens by expert, divided into blocks of equal size. The grouped products run over these blocks.

Legend: E experts, K places per token.
"""

import triton
import triton.language as tl

from ladimo.model.kernels.early_launch import wait_for_inputs


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
    EARLY: tl.constexpr,
):
    """Each program makes one list: its token numbers in rising order, their weights, and their count.

    List e has the tokens that chose expert e. List E + e has those of them that did not choose all experts. List 2E has the
    tokens that chose all experts. Only the lists below E have weights.
    """
    wait_for_inputs(EARLY)
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
    """Find the list of block number `block` (LISTS if there is none), the block's first place in it, and the list's length.

    Blocks have M tokens and are numbered through all lists, in order.
    """
    lists = tl.arange(0, BLOCK_LISTS)
    counts = tl.load(counts_ptr + lists, mask=lists < LISTS, other=0)
    blocks = (counts + M - 1) // M
    ends = tl.cumsum(blocks, axis=0)
    index = tl.sum(((ends <= block) & (lists < LISTS)).to(tl.int32), axis=0)
    begin = tl.sum(tl.where(lists == index, ends - blocks, 0), axis=0)
    return index, (block - begin) * M, tl.sum(tl.where(lists == index, counts, 0), axis=0)
