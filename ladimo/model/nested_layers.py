"""Layers whose weights can be read at several precisions, in the places of loaded ones; see `ladimo.model.nested`.

Each token says how many bits it wants. Without that the whole weights are read.
"""

from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.model.backends.torch_backend import BackendModule
from ladimo.model.moe import Experts
from ladimo.model.nested import NestedWeights, by_precision, read_planes
from ladimo.model.quantization import QuantizedWeights, find_format
from ladimo.model.refinement import column_norms, refine_logits
from ladimo.model.router import Router

# Of a matrix `name`: the tensors that a checkpoint keeps beside it.
ROUNDING, LOW_ROUNDING, SCALES = "rounding", "low_rounding", "scales"

Planes = tuple[QuantizedWeights, QuantizedWeights]  # high and low


class Stored(Protocol):
    """The tensors of a checkpoint by name. `get` raises ValueError if there is none of this name."""

    def __contains__(self, name: str) -> bool: ...

    def get(self, name: str) -> Tensor: ...


class Matrix(NamedTuple):
    """A nested matrix by the names that a checkpoint has for its weights, the rounding of its planes and its scales.
    `low_rounding` need not be there (`read_planes`)."""

    weight: str
    rounding: str
    low_rounding: str
    scales: str


HEAD = "lm_head"
TIED_HEAD = Matrix("model.embed_tokens.weight", *(f"{HEAD}.{part}" for part in (ROUNDING, LOW_ROUNDING, SCALES)))


class NestedLinear(BackendModule):
    """In the place of nn.Linear: weight and bias as they were, and the planes in buffers."""

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None, planes: Planes) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        _keep(self, "weight", planes)

    @property
    def nested(self) -> NestedWeights:
        return _kept(self, "weight", self.weight)

    def forward(self, x: Tensor, bits: Tensor | None = None) -> Tensor:
        """x [T, K] at each token's bits [T] -> [T, N]."""
        if bits is None:
            return F.linear(x, self.weight, self.bias)
        weights = self.nested
        return by_precision(bits, lambda rows, wanted: F.linear(rows, weights.at(wanted, rows.dtype), self.bias), x)


class NestedHead(NestedLinear):
    """The output head: words may be refined."""

    def refined(self, x: Tensor, bits: Tensor, refine: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, K], bits and refine [T] -> logits [T, V] and the refined words [T, G] (`refinement.refine_logits`)."""
        logits = self(x, bits)
        again, counts = refine_logits(x, logits, self.nested, refine)
        refining = (refine < torch.inf).unsqueeze(-1)
        return torch.where(refining, again, logits), counts * refining


class NestedExperts(nn.Module):
    """In the place of `Experts`."""

    norms: Tensor  # of the columns of down_proj, fp32 [E, F]

    def __init__(self, experts: Experts, gate_up: Planes, down: Planes) -> None:
        super().__init__()
        self.gate_up_whole, self.down_whole = experts.gate_up_proj, experts.down_proj
        _keep(self, "gate_up", gate_up)
        _keep(self, "down", down)
        self.register_buffer("norms", column_norms(experts.down_proj))

    @property
    def gate_up_proj(self) -> NestedWeights:
        return _kept(self, "gate_up", self.gate_up_whole)

    @property
    def down_proj(self) -> NestedWeights:
        return _kept(self, "down", self.down_whole)


@torch.no_grad()
def nest_layers(module: nn.Module, stored: Stored, prefix: str = "") -> None:
    """Replace the dense and the expert layers inside `module` by nested ones. `prefix` and a name in the module are the name
    of a stored tensor. Raises ValueError when a checkpoint's tensors do not fit each other."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.Linear):
            planes = _read(stored, matrix_named(f"{path}.weight"), child.weight.device)
            kind = NestedHead if path == HEAD else NestedLinear
            setattr(module, name, kind(child.weight, child.bias, planes))
        elif isinstance(child, Experts):
            device = child.down_proj.device
            gate_up, down = (_read(stored, matrix_named(f"{path}.{part}_proj"), device) for part in ("gate_up", "down"))
            setattr(module, name, NestedExperts(child, gate_up, down))
        elif not isinstance(child, Router):
            nest_layers(child, stored, f"{path}.")


@torch.no_grad()
def nested_head(embedding: Tensor, stored: Stored) -> NestedHead:
    """The output head of a model whose head is its embedding [V, D]."""
    return NestedHead(embedding, None, _read(stored, TIED_HEAD, embedding.device))


def matrix_named(weight: str) -> Matrix:
    """The matrix whose weights have this name: rounding of x.weight is x.rounding, of x_proj it is x_rounding."""
    stem = weight.removesuffix("weight") if weight.endswith(".weight") else weight.removesuffix("proj")
    return Matrix(weight, *(stem + part for part in (ROUNDING, LOW_ROUNDING, SCALES)))


def read_matrix(stored: Stored, matrix: Matrix, bits: int | None) -> Tensor:
    """The weights [..., N, K] that so many bits stand for, in the stored dtype; None for all bits."""
    weights = stored.get(matrix.weight)
    if bits is None:
        return weights
    return NestedWeights(weights, *_read(stored, matrix, weights.device)).at(bits, weights.dtype)


def _read(stored: Stored, matrix: Matrix, device: torch.device) -> Planes:
    low_rounding = stored.get(matrix.low_rounding) if matrix.low_rounding in stored else None
    try:
        weights, rounding, scales = (stored.get(name) for name in (matrix.weight, matrix.rounding, matrix.scales))
        high, low = read_planes(weights, rounding, scales, low_rounding)
    except ValueError as error:
        raise ValueError(f"{matrix.weight}: {error}") from error
    return _to(high, device), _to(low, device)


def _to(weights: QuantizedWeights, device: torch.device) -> QuantizedWeights:
    return replace(weights, data=weights.data.to(device), scales=weights.scales.to(device))


def _keep(module: nn.Module, name: str, planes: Planes) -> None:
    for plane, weights in zip(("high", "low"), planes, strict=True):
        module.register_buffer(f"{name}_{plane}", weights.data)
        module.register_buffer(f"{name}_{plane}_scales", weights.scales)


def _kept(module: nn.Module, name: str, full: Tensor) -> NestedWeights:
    cols, format = full.shape[-1], find_format("int4")
    high, low = (
        QuantizedWeights(module.get_buffer(f"{name}_{plane}"), module.get_buffer(f"{name}_{plane}_scales"), cols, format)
        for plane in ("high", "low")
    )
    return NestedWeights(full, high, low)
