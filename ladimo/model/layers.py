"""The dense building blocks of a LLaMA layer: RMSNorm, rotary embedding, the SwiGLU feed-forward network.

Legend: T tokens, D hidden_size, F intermediate_size, H heads, C head_dim.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.model import kernels
from ladimo.model.config import ModelConfig, RopeConfig


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation of x [..., D] in fp32, rounded before the weight [D] is applied as transformers' LLaMA
    does."""
    if kernels.available(x, weight):
        from ladimo.model.kernels import fused

        return fused.rms_norm(x, weight, eps)
    fp32 = x.float()
    fp32 = fp32 * torch.rsqrt(fp32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * fp32.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and the sum."""
    if kernels.available(x, residual, weight):
        from ladimo.model.kernels import fused

        return fused.add_rms_norm(x, residual, weight, eps)
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the middle of a SwiGLU network; both [..., F]."""
    if kernels.available(gate, up):
        from ladimo.model.kernels import fused

        return fused.silu_mul(gate, up)
    return F.silu(gate) * up


class RMSNorm(nn.Module):
    """See `rms_norm`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class GatedMLP(nn.Module):
    """down_proj(silu(gate_proj x) * up_proj x), weights [F, D] and [D, F]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.down_proj(silu_mul(self.gate_proj(hidden_states), self.up_proj(hidden_states)))
        return out


def rope_inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Inverse frequencies [C / 2] in fp32, scaled as the rope type says.

    "llama3" follows the Llama 3.1 release: long wavelengths are divided by `factor`, short ones kept, the band between
    interpolated.
    """
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.type == "linear":
        return inverse / rope.factor
    if rope.type == "llama3":
        wavelength = 2 * math.pi / inverse
        context = rope.original_max_position_embeddings
        smooth = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blended = (1 - smooth) * inverse / rope.factor + smooth * inverse
        scaled = torch.where(wavelength > context / rope.low_freq_factor, inverse / rope.factor, blended)
        return torch.where(wavelength < context / rope.high_freq_factor, inverse, scaled)
    return inverse


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position up to the context length, computed once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("table", torch.empty(0), persistent=False)

    def materialise(self, device: torch.device | str) -> None:
        """Fill the table [positions, 2, C]; separate from construction because models are built on the meta device."""
        inverse = rope_inverse_frequencies(self.config.rope, self.config.head_dim)
        angles = torch.arange(self.config.max_position_embeddings, dtype=torch.float32)[:, None] * inverse
        angles = torch.cat((angles, angles), dim=-1)
        self.table = torch.stack((angles.cos(), angles.sin()), dim=1).to(device)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions [T] -> cos, sin, each [T, 1, C]."""
        cos_sin = self.table[positions].to(dtype)
        return cos_sin[:, 0, None], cos_sin[:, 1, None]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, C]; the two halves of C form the pairs (Hugging Face's order)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
