"""Running the chosen experts. Reference: `ladimo.model.experts.apply_experts_grouped`.

One token needs matrix-vector products (`_matvec`). Their time is the time to read the weights of the chosen experts. More
tokens need two grouped matrix products over lists of tokens by expert (`_grouped`). They read the weights of an expert once for
every `m` tokens that chose it. In both forms, the block of an expert that no token chose returns at once. So the cost depends
on the routing, but the shapes do not.

The hidden activations of an expert are multiplied by the expert's weight, so the output is a plain sum. The experts of a token
are summed in fp32 in the order of their numbers, so the result does not depend on the rest of the batch. If a token takes all
experts of the layer, its output is one long product over all of them, which is the same work as the dense FFN.

Weights may be integers with scales. They are unpacked in registers as they are read; `ladimo.model.kernels.dequantize` explains
W, BITS and PARTS. They stay integers even for long prompts. Floating-point weights would multiply faster there, but all experts
of a layer would have to be unpacked, and a policy may use only a few.

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

# From this many tokens on, tokens that take all experts are computed like a dense FFN. With fewer tokens, the experts are
# computed separately and summed later, so that there is work for every multiprocessor.
DENSE_TOKENS = 512
# Longer inputs are computed in parts, because intermediate buffers have a place for every expert of every token.
MAX_TOKENS = 4096
# LIST_TILE: tokens per iteration when token lists are made. SUM_TILE: elements of a row per program when experts are summed.
LIST_TILE = 1024
SUM_TILE = 1024


@dataclass(frozen=True, slots=True)
class Tile:
    """The work of one program: `m` tokens times `n` output columns.

    Each iteration reads `k` stored elements of a weight row. `num_warps` and `num_stages` are Triton's launch options.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int = 1


# The tiles for one token: for the gate and up products, and for the down product. A large `k` keeps many loads in flight.
MATVEC_TILES = Tile(1, 4, 1024, num_warps=4), Tile(1, 4, 512, num_warps=4)
# The same for integer weights. A tile has so few scales that each thread loads its own and needs no synchronisation.
INTEGER_MATVEC_TILES = Tile(1, 4, 512, num_warps=4), Tile(1, 4, 512, num_warps=4)


def grouped_tiles(num_tokens: int, integers: bool = False) -> tuple[Tile, Tile]:
    """The tiles for the gate and up products, which have two accumulators of m x n, and for the down product."""
    if num_tokens <= 16:
        return Tile(16, 32, 64, num_warps=4, num_stages=5), Tile(16, 32, 64, num_warps=4, num_stages=5)
    if num_tokens <= 32:
        return Tile(32, 32, 64, num_warps=4, num_stages=5), Tile(32, 32, 64, num_warps=4, num_stages=5)
    if num_tokens < DENSE_TOKENS:
        return Tile(64, 64, 64, num_warps=4, num_stages=4), Tile(64, 64, 64, num_warps=4, num_stages=4)
    if integers:  # an int4 iteration needs 2 k columns of both factors, and in fp32 these must fit into shared memory
        return Tile(128, 64, 64, num_warps=8, num_stages=3), Tile(128, 64, 64, num_warps=8, num_stages=3)
    return Tile(128, 128, 64, num_warps=8, num_stages=3), Tile(128, 128, 64, num_warps=8, num_stages=4)


def apply_experts(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    tiles: tuple[Tile, Tile] | None = None,
    dense_tokens: int = DENSE_TOKENS,
    max_tokens: int = MAX_TOKENS,
) -> Tensor:
    """Run the chosen experts, [T, D] -> [T, D]. See the reference. `tiles` replaces the default choice, which depends on the
    number of tokens."""
    num_tokens = hidden_states.shape[0]
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    for begin in range(0, num_tokens, max_tokens):
        part = slice(begin, begin + max_tokens)
        x, weights, ids = (tensor[part].contiguous() for tensor in (hidden_states, topk_weights, topk_ids))
        if num_tokens == 1:
            _matvec(x, weights, ids, gate_up_proj, down_proj, out, tiles)
        else:
            _grouped(x, weights, ids, gate_up_proj, down_proj, out[part], tiles, dense_tokens)
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
def silu(x):
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
    rows = tl.minimum(columns, F - 1)  # a partial last block reads the last row again
    inner = tl.arange(0, BLOCK)[None, :]
    gate_rows = expert.to(tl.int64) * (2 * F) + rows[:, None]
    gate_ptrs = gate_up_ptr + gate_rows * W + inner
    # x is loaded in the shape of the weights, once for each row. Each thread then has both factors, so threads exchange nothing
    # before the final sums.
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
    hidden = silu(tl.sum(gate, axis=1)) * tl.sum(up, axis=1) * weight
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
    """out[n..n+N] = sum of down[e] @ hidden[e] over the token's experts e, in the order of their numbers."""
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
    dense_tokens: int,
) -> None:
    num_tokens, hidden_size = x.shape
    num_experts, _, intermediate_size = down_proj.shape
    num_places = ids.shape[1]
    dense = num_tokens >= dense_tokens
    first, second = tiles or grouped_tiles(num_tokens, integers=not isinstance(gate_up_proj, Tensor))
    # The lists of `list_kernel`. Only `dense` needs those from E on.
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
    hidden = silu(gate) * up * weights[:, None]
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
    """parts[t, e, n..n+N] = down[e] @ hidden[t, e] for M tokens t of list e < E. List E: out[t, n..n+N] over all experts."""
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
    """out[t] = sum of parts[t, e] over the token's experts e, in order. With DENSE, tokens with all experts are done
    already."""
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
