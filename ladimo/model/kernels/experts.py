"""Running the chosen experts. Reference: `ladimo.model.experts.apply_experts_grouped`.

One token is matrix-vector products, bound by reading the weights of the experts chosen (`_matvec`). More tokens are two grouped
matrix products over lists of tokens by expert (`_grouped`): up to `m` of a tile's tokens an expert's weights are read once,
however many chose it. In both an expert nobody chose is a block that returns at once, so cost follows the routing while
shapes do not.

The weight of an expert is multiplied into its hidden activations, so that the output is a plain sum. A token's experts are
summed in expert order in fp32, so its numbers do not depend on its neighbours. A token that takes every expert of the layer
is one row of one long product over all of them: the dense FFN's own work.

Weights may be integers with scales, unpacked in registers as they are read: `W`, `BITS` and `PARTS` are those of
`kernels.dequantize`. They stay integers in long prompts, too, where whole weights would multiply faster: those would take a
copy of all experts of a layer, of which a policy may use a few.

Legend: T tokens, D hidden_size, F moe_intermediate_size, E experts, K places per token.

The file is long because one function launches both forms of the layer, for one token and for many, and they share their tiles.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladimo.model.kernels.dequantize import load_columns, load_elements, stored, widen
from ladimo.model.kernels.moe_align import find_block, list_kernel
from ladimo.model.quantization import Weights

# From this many tokens on, tokens that take every expert are multiplied as the dense FFN would; below, the sum over experts
# is kept apart so that there is work for every multiprocessor.
DENSE_TOKENS = 512
# Intermediate buffers have a place for every expert of every token, so longer inputs are cut.
MAX_TOKENS = 4096
# Tokens per step when lists of tokens are made, and elements of a row per program when experts are summed.
LIST_TILE = 1024
SUM_TILE = 1024


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's share: `m` tokens times `n` output columns, `k` stored elements of a row of weights at a time."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int = 1


# For the gate and up products and for the down product of one token. A wide `k` keeps many bytes in flight.
MATVEC_TILES = Tile(1, 4, 1024, num_warps=4), Tile(1, 4, 512, num_warps=4)
# The same for integers: so few scales belong to a tile that threads load their own and wait for nobody.
INTEGER_MATVEC_TILES = Tile(1, 4, 512, num_warps=4), Tile(1, 4, 512, num_warps=4)


def grouped_tiles(num_tokens: int, integers: bool = False) -> tuple[Tile, Tile]:
    """For the gate and up products (two accumulators of m x n) and for the down product."""
    if num_tokens <= 16:
        return Tile(16, 32, 64, num_warps=4, num_stages=5), Tile(16, 32, 64, num_warps=4, num_stages=5)
    if num_tokens <= 32:
        return Tile(32, 32, 64, num_warps=4, num_stages=5), Tile(32, 32, 64, num_warps=4, num_stages=5)
    if num_tokens < DENSE_TOKENS:
        return Tile(64, 64, 64, num_warps=4, num_stages=4), Tile(64, 64, 64, num_warps=4, num_stages=4)
    if integers:  # a step of int4 takes 2 k columns of both factors, which in fp32 must find room in shared memory
        return Tile(128, 64, 64, num_warps=8, num_stages=3), Tile(128, 64, 64, num_warps=8, num_stages=3)
    return Tile(128, 128, 64, num_warps=8, num_stages=3), Tile(128, 128, 64, num_warps=8, num_stages=4)


def apply_experts(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    tiles: tuple[Tile, Tile] | None = None,
) -> Tensor:
    """See the reference; `tiles` overrides the choice made from the number of tokens."""
    num_tokens = hidden_states.shape[0]
    run = _matvec if num_tokens == 1 else _grouped
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    for begin in range(0, num_tokens, MAX_TOKENS):
        part = slice(begin, begin + MAX_TOKENS)
        x, weights, ids = (tensor[part].contiguous() for tensor in (hidden_states, topk_weights, topk_ids))
        run(x, weights, ids, gate_up_proj, down_proj, out[part], tiles)
    return out


def _matvec(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    out: Tensor,
    tiles: tuple[Tile, Tile] | None,
) -> None:
    num_experts, hidden_size, intermediate_size = down_proj.shape
    first, second = tiles or (MATVEC_TILES if isinstance(gate_up_proj, Tensor) else INTEGER_MATVEC_TILES)
    hidden = torch.empty(num_experts, intermediate_size, dtype=torch.float32, device=x.device)
    sizes = {
        "E": num_experts,
        "D": hidden_size,
        "F": intermediate_size,
        "K": ids.shape[1],
        "BLOCK_PLACES": triton.next_power_of_2(ids.shape[1]),
    }
    gate_up, scales, form = stored(gate_up_proj)
    _matvec_gate_up_kernel[(num_experts, triton.cdiv(intermediate_size, first.n))](
        x, weights, ids, gate_up, scales, hidden, **sizes, **form, N=first.n, BLOCK=first.k, num_warps=first.num_warps
    )
    down, scales, form = stored(down_proj)
    _matvec_down_kernel[(triton.cdiv(hidden_size, second.n),)](
        hidden, ids, down, scales, out, **sizes, **form, N=second.n, BLOCK=second.k, num_warps=second.num_warps
    )


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _matvec_gate_up_kernel(
    x_ptr,
    weights_ptr,
    ids_ptr,
    gate_up_ptr,
    scales_ptr,
    hidden_ptr,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """hidden[e, n..n+N] = weight * silu(gate x) * up x if the token chose expert e."""
    expert = tl.program_id(0)
    places = tl.arange(0, BLOCK_PLACES)
    chosen = tl.load(ids_ptr + places, mask=places < K, other=-1) == expert
    if tl.sum(chosen.to(tl.int32), axis=0) == 0:
        return
    weight = tl.sum(tl.where(chosen, tl.load(weights_ptr + places, mask=places < K, other=0.0), 0.0), axis=0)

    columns = tl.program_id(1) * N + tl.arange(0, N)
    rows = tl.minimum(columns, F - 1)  # a last, partial block reads its last row again
    inner = tl.arange(0, BLOCK)[None, :]
    gate_rows = expert.to(tl.int64) * (2 * F) + rows[:, None]
    gate_ptrs = gate_up_ptr + gate_rows * W + inner
    # x is loaded in the shape of the weights, once per row: threads then hold what they multiply, and nothing is exchanged
    # between them until the sums at the end.
    x_ptrs = x_ptr + tl.zeros([N, 1], dtype=tl.int32) + inner
    gate = tl.zeros([N, BLOCK], dtype=tl.float32)
    up = tl.zeros([N, BLOCK], dtype=tl.float32)
    for start in tl.static_range(0, W, BLOCK):
        for part in tl.static_range(PARTS):
            columns_of_x = part * W + start
            x = tl.load(x_ptrs + columns_of_x, mask=columns_of_x + inner < D, other=0.0).to(tl.float32)
            if part == 0:
                g = tl.load(gate_ptrs + start, mask=start + inner < W, other=0)
            gate += x * widen(g, scales_ptr, gate_rows, start, W, BITS, part, 1).to(tl.float32)
            if part == 0:
                u = tl.load(gate_ptrs + F * W + start, mask=start + inner < W, other=0)
            up += x * widen(u, scales_ptr, gate_rows + F, start, W, BITS, part, 1).to(tl.float32)
    hidden = _silu(tl.sum(gate, axis=1)) * tl.sum(up, axis=1) * weight
    tl.store(hidden_ptr + expert * F + columns, hidden, mask=columns < F)


@triton.jit
def _matvec_down_kernel(
    hidden_ptr,
    ids_ptr,
    down_ptr,
    scales_ptr,
    out_ptr,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n..n+N]: the sum over the token's experts, in expert order, of down @ hidden[e]."""
    places = tl.arange(0, BLOCK_PLACES)
    ids = tl.load(ids_ptr + places, mask=places < K, other=-1)
    columns = tl.program_id(0) * N + tl.arange(0, N)
    rows = tl.minimum(columns, D - 1)
    inner = tl.arange(0, BLOCK)[None, :]
    out = tl.zeros([N, BLOCK], dtype=tl.float32)
    for expert in range(E):
        if tl.sum((ids == expert).to(tl.int32), axis=0) > 0:
            down_rows = tl.cast(expert, tl.int64) * D + rows[:, None]
            down_ptrs = down_ptr + down_rows * W + inner
            hidden_ptrs = hidden_ptr + expert * F + tl.zeros([N, 1], dtype=tl.int32) + inner
            for start in tl.static_range(0, W, BLOCK):
                for part in tl.static_range(PARTS):
                    places_of_hidden = part * W + start
                    hidden = tl.load(hidden_ptrs + places_of_hidden, mask=places_of_hidden + inner < F, other=0.0)
                    if part == 0:
                        w = tl.load(down_ptrs + start, mask=start + inner < W, other=0)
                    out += hidden * widen(w, scales_ptr, down_rows, start, W, BITS, part, 1).to(tl.float32)
    tl.store(out_ptr + columns, tl.sum(out, axis=1).to(out_ptr.dtype.element_ty), mask=columns < D)


def _grouped(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    out: Tensor,
    tiles: tuple[Tile, Tile] | None,
) -> None:
    num_tokens, hidden_size = x.shape
    num_experts, _, intermediate_size = down_proj.shape
    num_places = ids.shape[1]
    dense = num_tokens >= DENSE_TOKENS
    first, second = tiles or grouped_tiles(num_tokens, integers=not isinstance(gate_up_proj, Tensor))
    # Lists: per expert its tokens; if `dense`, then per expert those that did not choose all, last those that did.
    num_lists = 2 * num_experts + 1 if dense else num_experts
    counts = torch.empty(num_lists, dtype=torch.int32, device=x.device)
    lists = torch.empty(num_lists, num_tokens, dtype=torch.int32, device=x.device)
    list_weights = torch.empty(num_experts, num_tokens, dtype=torch.float32, device=x.device)
    places = {"K": num_places, "BLOCK_PLACES": triton.next_power_of_2(num_places)}
    list_tile = min(triton.next_power_of_2(num_tokens), max(16, LIST_TILE * 8 // places["BLOCK_PLACES"]), LIST_TILE)
    list_kernel[(num_lists,)](ids, weights, counts, lists, list_weights, num_tokens, E=num_experts, TILE=list_tile, **places)

    hidden = x.new_empty(num_tokens, num_experts, intermediate_size)
    sizes = {"E": num_experts, "D": hidden_size, "F": intermediate_size}
    blocks = num_experts * triton.cdiv(num_tokens, first.m) * triton.cdiv(intermediate_size, first.n)
    gate_up, scales, form = stored(gate_up_proj)
    _grouped_gate_up_kernel[(blocks,)](
        x,
        counts,
        lists,
        list_weights,
        gate_up,
        scales,
        hidden,
        num_tokens,
        **sizes,
        **form,
        BLOCK_LISTS=triton.next_power_of_2(num_experts),
        M=first.m,
        N=first.n,
        BLOCK=first.k,
        num_warps=first.num_warps,
        num_stages=first.num_stages,
    )
    used = slice(num_experts, None) if dense else slice(None)
    parts = x.new_empty(num_tokens, num_experts, hidden_size)
    blocks = (num_experts * triton.cdiv(num_tokens, second.m) + dense) * triton.cdiv(hidden_size, second.n)
    down, scales, form = stored(down_proj)
    _grouped_down_kernel[(blocks,)](
        hidden,
        counts[used],
        lists[used],
        down,
        scales,
        parts,
        out,
        num_tokens,
        **sizes,
        **form,
        LISTS=num_experts + dense,
        BLOCK_LISTS=triton.next_power_of_2(num_experts + dense),
        M=second.m,
        N=second.n,
        BLOCK=second.k,
        num_warps=second.num_warps,
        num_stages=second.num_stages,
    )
    sum_tile = min(SUM_TILE, triton.next_power_of_2(hidden_size))
    _sum_kernel[(num_tokens, triton.cdiv(hidden_size, sum_tile))](
        parts, ids, out, E=num_experts, D=hidden_size, DENSE=dense, BLOCK=sum_tile, **places
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _grouped_gate_up_kernel(
    x_ptr,
    counts_ptr,
    lists_ptr,
    list_weights_ptr,
    gate_up_ptr,
    scales_ptr,
    hidden_ptr,
    num_tokens,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_LISTS: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """hidden[t, e, n..n+N] = weight * silu(gate x_t) * up x_t for M tokens t of expert e's list."""
    column_blocks: tl.constexpr = (F + N - 1) // N
    expert, begin, count = find_block(counts_ptr, tl.program_id(0) // column_blocks, E, BLOCK_LISTS, M)
    if expert >= E:
        return
    places = begin + tl.arange(0, M)
    live = places < count
    tokens = tl.load(lists_ptr + expert * num_tokens + places, mask=live, other=0).to(tl.int64)
    weights = tl.load(list_weights_ptr + expert * num_tokens + places, mask=live, other=0.0)

    columns = (tl.program_id(0) % column_blocks) * N + tl.arange(0, N)
    rows = tl.minimum(columns, F - 1)
    inner = tl.arange(0, BLOCK)
    x_ptrs = x_ptr + tokens[:, None] * D + inner[None, :]
    gate_rows = expert.to(tl.int64) * (2 * F) + rows[None, :]
    gate_ptrs = gate_up_ptr + gate_rows * W + inner[:, None]
    up_ptrs = gate_ptrs + F * W
    gate = tl.zeros([M, N], dtype=tl.float32)
    up = tl.zeros([M, N], dtype=tl.float32)
    whole: tl.constexpr = D % (PARTS * BLOCK) == 0
    for start in range(0, W, BLOCK):
        for part in tl.static_range(PARTS):
            x = load_columns(x_ptrs, part * W + start, inner, live, D, whole)
            if part == 0:
                g = load_elements(gate_ptrs, start, inner, W, whole)
                u = load_elements(up_ptrs, start, inner, W, whole)
            g_part = widen(g, scales_ptr, gate_rows, start, W, BITS, part, 0).to(x.dtype)
            u_part = widen(u, scales_ptr, gate_rows + F, start, W, BITS, part, 0).to(x.dtype)
            gate = tl.dot(x, g_part, gate, input_precision="ieee")
            up = tl.dot(x, u_part, up, input_precision="ieee")
    hidden = _silu(gate) * up * weights[:, None]
    hidden_ptrs = hidden_ptr + (tokens[:, None] * E + expert) * F + columns[None, :]
    tl.store(hidden_ptrs, hidden.to(hidden_ptr.dtype.element_ty), mask=live[:, None] & (columns < F)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _grouped_down_kernel(
    hidden_ptr,
    counts_ptr,
    lists_ptr,
    down_ptr,
    scales_ptr,
    parts_ptr,
    out_ptr,
    num_tokens,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    LISTS: tl.constexpr,
    BLOCK_LISTS: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """parts[t, e, n..n+N] = down @ hidden[t, e] for M tokens of expert e's list; list E: out[t, n..n+N], over all experts."""
    column_blocks: tl.constexpr = (D + N - 1) // N
    index, begin, count = find_block(counts_ptr, tl.program_id(0) // column_blocks, LISTS, BLOCK_LISTS, M)
    if index >= LISTS:
        return
    all_experts = index == E  # a scalar of the program
    first_expert = tl.where(all_experts, 0, index)
    num_experts = tl.where(all_experts, E, 1)
    places = begin + tl.arange(0, M)
    live = places < count
    tokens = tl.load(lists_ptr + index * num_tokens + places, mask=live, other=0).to(tl.int64)

    columns = (tl.program_id(0) % column_blocks) * N + tl.arange(0, N)
    rows = tl.minimum(columns, D - 1)
    inner = tl.arange(0, BLOCK)
    hidden_ptrs = hidden_ptr + tokens[:, None] * (E * F) + inner[None, :]
    down_ptrs = down_ptr + rows[None, :] * W + inner[:, None]
    acc = tl.zeros([M, N], dtype=tl.float32)
    whole: tl.constexpr = F % (PARTS * BLOCK) == 0
    steps: tl.constexpr = (W + BLOCK - 1) // BLOCK
    for step in range(0, num_experts * steps):
        expert = (first_expert + step // steps).to(tl.int64)
        start = (step % steps) * BLOCK
        for part in tl.static_range(PARTS):
            h = load_columns(hidden_ptrs + expert * F, part * W + start, inner, live, F, whole)
            if part == 0:
                w = load_elements(down_ptrs + expert * (D * W), start, inner, W, whole)
            w_part = widen(w, scales_ptr, expert * D + rows[None, :], start, W, BITS, part, 0).to(h.dtype)
            acc = tl.dot(h, w_part, acc, input_precision="ieee")
    acc = acc.to(out_ptr.dtype.element_ty)
    inside = live[:, None] & (columns < D)[None, :]
    tl.store(out_ptr + tokens[:, None] * D + columns[None, :], acc, mask=inside & all_experts)
    tl.store(parts_ptr + (tokens[:, None] * E + index) * D + columns[None, :], acc, mask=inside & ~all_experts)


@triton.jit
def _sum_kernel(
    parts_ptr,
    ids_ptr,
    out_ptr,
    E: tl.constexpr,
    D: tl.constexpr,
    DENSE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t]: the sum of parts[t, e] over the token's experts in expert order; if DENSE, tokens with all are done already."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK_PLACES)
    ids = tl.load(ids_ptr + token * K + places, mask=places < K, other=-1)
    if DENSE and tl.sum((ids >= 0).to(tl.int32), axis=0) == E:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < D
    out = tl.zeros([BLOCK], dtype=tl.float32)
    for expert in range(E):
        runs = tl.max((ids == expert).to(tl.int32), axis=0) > 0
        out += tl.load(parts_ptr + (token * E + expert) * D + columns, mask=live & runs, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + columns, out.to(out_ptr.dtype.element_ty), mask=live)
