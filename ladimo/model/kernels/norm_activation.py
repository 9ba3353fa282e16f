"""Norms and activations in one pass over memory. Results are rounded at the same points as in `ladimo.model.norm_activation`.

Legend: T tokens, D hidden_size, F intermediate_size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladimo.model.kernels.early_launch import early_launch, wait_for_inputs

ELEMENTWISE_TILE = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [T, D]. Reference: `ladimo.model.norm_activation.rms_norm`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_rms_norm(x.contiguous(), None, weight, out, None, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, and the sum; all [T, D]. Reference: `ladimo.model.norm_activation.add_rms_norm`."""
    out, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _launch_rms_norm(x.contiguous(), residual.contiguous(), weight, out, total, eps)
    return out, total


def _launch_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None, eps: float) -> None:
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(x.numel() // size,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        out if total is None else total,
        eps,
        D=size,
        ADD=residual is not None,
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
        **early_launch(),
    )


@triton.jit(do_not_specialize=["eps"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    eps,
    D: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    row = tl.program_id(0).to(tl.int64) * D
    columns = tl.arange(0, BLOCK)
    live = columns < D
    dtype = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=live, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row + columns, mask=live, other=0.0).to(tl.float32)
    if ADD:
        total = (x + tl.load(residual_ptr + row + columns, mask=live, other=0.0).to(tl.float32)).to(dtype)
        tl.store(total_ptr + row + columns, total, mask=live)
        x = total.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(out_ptr + row + columns, (weight * x.to(dtype).to(tl.float32)).to(dtype), mask=live)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x):
    """By its approximation with tanh: x (1 + tanh(u)) / 2 = x sigmoid(2 u), where 2 u = 1.5957691 (x + 0.044715 x^3)."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [T, F]. Reference: `ladimo.model.norm_activation.silu_mul`."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    size = gate.shape[-1]
    _silu_mul_kernel[(gate.numel() // size, triton.cdiv(size, ELEMENTWISE_TILE))](
        gate.contiguous(), up.contiguous(), out, F=size, BLOCK=ELEMENTWISE_TILE, **early_launch()
    )
    return out


@triton.jit
def _silu_mul_kernel(gate_ptr, up_ptr, out_ptr, F: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait_for_inputs(EARLY)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < F
    places = tl.program_id(0).to(tl.int64) * F + columns
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + places, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=live, other=0.0).to(tl.float32)
    activated = silu(gate).to(dtype).to(tl.float32)
    tl.store(out_ptr + places, (activated * up).to(dtype), mask=live)
