"""The chosen experts of one token, as matrix-vector products. See `ladimo.model.kernels.experts`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladimo.model.kernels.dequantize import stored, widen
from ladimo.model.kernels.early_launch import early_launch, wait_for_inputs
from ladimo.model.kernels.norm_activation import silu
from ladimo.model.kernels.tiles import Tile
from ladimo.model.quantization import Weights

# The tiles for one token: for the gate and up products, and for the down product. A large `k` keeps many loads in flight.
MATVEC_TILES = Tile(1, 4, 1024, num_warps=4), Tile(1, 4, 512, num_warps=4)
# The same for integer weights. A tile has so few scales that each thread loads its own and needs no synchronisation.
INTEGER_MATVEC_TILES = Tile(1, 4, 512, num_warps=4), Tile(1, 4, 512, num_warps=4)


def matvec(
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
        x,
        weights,
        ids,
        gate_up,
        scales,
        hidden,
        **sizes,
        **form,
        N=first.n,
        BLOCK=first.k,
        num_warps=first.num_warps,
        **early_launch(),
    )
    down, scales, form = stored(down_proj)
    _matvec_down_kernel[(triton.cdiv(hidden_size, second.n),)](
        hidden,
        ids,
        down,
        scales,
        out,
        **sizes,
        **form,
        N=second.n,
        BLOCK=second.k,
        num_warps=second.num_warps,
        **early_launch(),
    )


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
    EARLY: tl.constexpr,
):
    """hidden[e, n..n+N] = weight * silu(gate x) * up x if the token chose expert e."""
    wait_for_inputs(EARLY)
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
    EARLY: tl.constexpr,
):
    """out[n..n+N] = sum of down[e] @ hidden[e] over the token's experts e, in the order of their numbers."""
    wait_for_inputs(EARLY)
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
