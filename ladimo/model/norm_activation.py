"""Norms and activations in torch: the reference for all back ends."""

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation of x [..., D] in fp32. As in transformers' LLaMA, the result is rounded to the dtype of x
    before it is multiplied by the weight [D]."""
    fp32 = x.float()
    fp32 = fp32 * torch.rsqrt(fp32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * fp32.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and the sum. Both are [..., D]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the activation of a SwiGLU FFN; both [..., F]."""
    return F.silu(gate) * up
