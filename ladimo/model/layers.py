"""The dense building blocks of a layer: norms, rotary embedding, feed-forward networks.

Legend: T tokens, D hidden_size, F intermediate_size, H heads, C head_dim.
"""

import math
import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.model.backends.torch_backend import BackendModule
from ladimo.model.config import FfnKind, ModelConfig, RopeConfig


class Linear(BackendModule, nn.Linear):
    """nn.Linear in the back end's product. Integer and nested layers take its place."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return self.backend.linear(x, self.weight, self.bias)


class RMSNorm(BackendModule):
    """RMSNorm over the last dimension; see `norm_activation.rms_norm`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.backend.rms_norm(hidden_states, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum. Both inputs and outputs are [T, D]."""
        return self.backend.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension, with weight and bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.layer_norm(hidden_states, self.weight.shape, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum. Both inputs and outputs are [T, D]."""
        total = x + residual
        return self(total), total


Norm = RMSNorm | LayerNorm


def make_norm(config: ModelConfig) -> Norm:
    """A norm of hidden states."""
    return (LayerNorm if config.norm_kind == "layer" else RMSNorm)(config.hidden_size, config.rms_norm_eps)


class GatedMLP(BackendModule):
    """The dense FFN: down_proj(silu(gate_proj x) * up_proj x). Weights are [F, D], [F, D] and [D, F]."""

    kind: FfnKind = "swiglu"

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        hidden = self.backend.silu_mul(self.gate_proj(hidden_states), self.up_proj(hidden_states))
        out: Tensor = self.down_proj(hidden)
        return out


class GeluMLP(nn.Module):
    """An FFN without a gate: down_proj(gelu(up_proj x)), GELU by its approximation with tanh. Both projections have biases.

    Weights are [F, D] and [D, F].
    """

    kind: FfnKind = "gelu"

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        out: Tensor = self.down_proj(F.gelu(self.up_proj(hidden_states), approximate="tanh"))
        return out


Ffn = GatedMLP | GeluMLP
FFNS: Mapping[FfnKind, type[GatedMLP] | type[GeluMLP]] = {"swiglu": GatedMLP, "gelu": GeluMLP}


def rope_inverse_frequencies(rope: RopeConfig, rotary_dim: int, length: int = 0) -> Tensor:
    """Inverse frequencies [rotary_dim / 2] in fp32, scaled as the rope type says. `length`: of the text, for type "longrope".

    "llama3" follows the Llama 3.1 release: frequencies of long wavelengths are divided by `factor`, those of short wavelengths
    are kept, and those in between are interpolated.
    """
    inverse = 1.0 / rope.theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    if rope.type == "longrope":
        return inverse / torch.tensor(rope.long_factor if length > rope.original_max_position_embeddings else rope.short_factor)
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
    """Tables of cosines and sines for all positions up to the context length, computed once. R rotary_dim.

    Type "longrope" has other frequencies for short texts than for long ones. The KV cache holds keys that are rotated already.
    So over a cache, the frequencies are those for texts as long as the context, whatever a text's own length is.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("table", torch.empty(0), persistent=False)
        self.register_buffer("short_table", torch.empty(0), persistent=False)

    def materialise(self, device: torch.device | str, context: int | None = None) -> None:
        """Compute the tables [positions, 2, R]. The constructor cannot do it, because models are built on the meta device.

        `context`: the length of the longest text; None: the model's own context length. It is at most that.
        """
        longest, rope = min(context or sys.maxsize, self.config.max_position_embeddings), self.config.rope
        self.table = self._compute(longest).to(device)
        if rope.type == "longrope" and longest > rope.original_max_position_embeddings:
            self.short_table = self._compute(rope.original_max_position_embeddings).to(device)

    def forward(self, positions: Tensor, dtype: torch.dtype, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Positions [T] -> cos, sin, each [T, 1, R]. `length`: of the texts; None: they are in a KV cache."""
        is_short = length is not None and length <= len(self.short_table)
        cos_sin = (self.short_table if is_short else self.table)[positions].to(dtype)
        return cos_sin[:, 0, None], cos_sin[:, 1, None]

    def _compute(self, length: int) -> Tensor:
        inverse = rope_inverse_frequencies(self.config.rope, self.config.rotary_dim, length)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse
        angles = torch.cat((angles, angles), dim=-1)
        return torch.stack((angles.cos(), angles.sin()), dim=1) * self.config.rope.attention_factor
