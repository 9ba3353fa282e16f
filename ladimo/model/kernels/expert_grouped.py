"""The chosen experts of several tokens, as matrix products over lists of tokens. See `ladimo.model.kernels.experts`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladimo.model.kernels.dequantize import load_columns, load_elements, stored, widen
from ladimo.model.kernels.early_launch import early_launch, wait_for_inputs
from ladimo.model.kernels.moe_align import find_block, list_kernel
from ladimo.model.kernels.norm_activation import silu
from ladimo.model.kernels.tiles import Tile
from ladimo.model.quantization import Weights

# From this many tokens on, tokens that take all experts are computed like a dense FFN. With fewer tokens, the experts are
# computed separately and summed later, so that there is work for every multiprocessor.
DENSE_TOKENS = 512
# LIST_TILE: tokens per iteration when token lists are made. SUM_TILE: elements of a row per program when experts are summed.
LIST_TILE = 1024
SUM_TILE = 1024


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


def grouped(
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
    list_kernel[(num_lists,)](
        ids, weights, counts, lists, list_weights, num_tokens, E=num_experts, TILE=list_tile, **places, **early_launch()
    )

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
        **early_launch(),
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
        **early_launch(),
    )
    sum_tile = min(SUM_TILE, triton.next_power_of_2(hidden_size))
    _sum_kernel[(num_tokens, triton.cdiv(hidden_size, sum_tile))](
        parts, ids, out, E=num_experts, D=hidden_size, DENSE=dense, BLOCK=sum_tile, **places, **early_launch()
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
    EARLY: tl.constexpr,
):
    """hidden[t, e, n..n+N] = weight * silu(gate x_t) * up x_t for M tokens t of expert e's list."""
    wait_for_inputs(EARLY)
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
    EARLY: tl.constexpr,
):
    """parts[t, e, n..n+N] = down[e] @ hidden[t, e] for M tokens t of list e < E. List E: out[t, n..n+N] over all experts."""
    wait_for_inputs(EARLY)
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
    EARLY: tl.constexpr,
):
    """out[t] = sum of parts[t, e] over the token's experts e, in order. With DENSE, tokens with all experts are done
    already."""
    wait_for_inputs(EARLY)
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
