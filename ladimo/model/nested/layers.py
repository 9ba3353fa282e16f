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
from ladimo.model.nested.plane_layout import DownWeights, NeuronRows, to_neuron_rows, to_words
from ladimo.model.nested.refinement import column_norms
from ladimo.model.nested.weights import STEPS, NestedWeights, planes_from_nibbles, read_planes
from ladimo.model.precision import GROUP, NESTED_BITS
from ladimo.model.quantization import QuantizedWeights
from ladimo.model.router import Router

# Of a matrix `name`: the tensors that a checkpoint keeps beside it, or, where the top is 8 bits, in its place.
ROUNDING, LOW_ROUNDING, SCALES, HIGH, LOW = "rounding", "low_rounding", "scales", "high", "low"

Planes = tuple[QuantizedWeights, QuantizedWeights]  # high and low


class Stored(Protocol):
    """The tensors of a checkpoint by name. `get` raises ValueError if there is none of this name."""

    def __contains__(self, name: str) -> bool: ...

    def get(self, name: str) -> Tensor: ...


class Matrix(NamedTuple):
    """A nested matrix by the names that a checkpoint has for its tensors. It keeps either the weights, the rounding of the
    planes and the scales (`low_rounding` may be missing, see `read_planes`), or the planes and the scales."""

    weight: str
    rounding: str
    low_rounding: str
    scales: str
    high: str
    low: str


PARTS = (ROUNDING, LOW_ROUNDING, SCALES, HIGH, LOW)
HEAD, EMBEDDING = "lm_head", "model.embed_tokens.weight"
TIED_HEAD = Matrix(EMBEDDING, *(f"{HEAD}.{part}" for part in PARTS))


class NestedLinear(BackendModule):
    """In the place of nn.Linear: weight and bias as they were, and the planes in buffers. weight: None where the top is 8
    bits."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor | None, bias: Tensor | None, planes: Planes) -> None:
        super().__init__()
        for name, tensor in (("weight", weight), ("bias", bias)):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        _keep(self, "weight", planes)

    @property
    def nested(self) -> NestedWeights:
        return _kept(self, "weight", self.weight)

    def lay_out(self) -> None:
        """Put the planes where GPU kernels want them."""
        _lay_out(self, "weight")

    def forward(self, x: Tensor, bits: Tensor | None = None) -> Tensor:
        """x [T, K] at each token's bits [T] -> [T, N]."""
        if bits is None:
            return F.linear(x, self.nested.at(torch.inf, x.dtype), self.bias)
        return self.backend.nested_linear(x, self.nested, bits, self.bias)


class NestedHead(NestedLinear):
    """The output head: words may be refined."""

    def refined(self, x: Tensor, bits: Tensor, refine: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, K], bits and refine [T] -> logits [T, V] and the refined words [T, G] (`refinement.refine_logits`)."""
        return self.backend.nested_logits(x, self.nested, bits, refine, self.bias)


class NestedExperts(nn.Module):
    """In the place of `Experts`."""

    gate_up_whole: nn.Parameter | None
    down_whole: nn.Parameter | None
    up_bias: nn.Parameter | None  # in floating point, as it was
    norms: Tensor  # of the columns of down_proj, fp32 [E, F]
    laid_out = False  # where GPU kernels want the planes

    def __init__(self, experts: Experts, gate_up: Planes, down: Planes, *, whole: bool = True) -> None:
        """whole: whether `experts` have the whole weights. They have not where the top is 8 bits."""
        super().__init__()
        self.register_parameter("gate_up_whole", experts.gate_up_proj if whole else None)
        self.register_parameter("down_whole", experts.down_proj if whole else None)
        self.register_parameter("up_bias", experts.up_bias)
        _keep(self, "gate_up", gate_up)
        _keep(self, "down", down)
        self.register_buffer("norms", column_norms(self.down_proj.at(torch.inf, torch.float32)))

    @property
    def gate_up_proj(self) -> NestedWeights:
        return _kept(self, "gate_up", self.gate_up_whole)

    @property
    def down_proj(self) -> NestedWeights:
        weights = _kept(self, "down", self.down_whole)
        if not self.laid_out:
            return weights
        neurons = NeuronRows(self.get_buffer("down_neurons"), self.get_buffer("down_neurons_scales"))
        return DownWeights(weights.full, weights.high, weights.low, neurons)

    def lay_out(self) -> None:
        """Put the planes where GPU kernels want them."""
        if self.laid_out:
            return
        neurons = to_neuron_rows(self.down_proj.low)
        self.register_buffer("down_neurons", neurons.data)
        self.register_buffer("down_neurons_scales", neurons.scales)
        self.laid_out = True
        _lay_out(self, "gate_up")
        _lay_out(self, "down")


class NestedEmbedding(nn.Module):
    """In the place of nn.Embedding, where the top is 8 bits: rows are read from the planes. dtype: that of the rows."""

    def __init__(self, planes: Planes, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        _keep(self, "weight", planes)

    @property
    def nested(self) -> NestedWeights:
        return _kept(self, "weight", None)

    @property
    def weight(self) -> Tensor:
        """All rows, [V, D]."""
        return self.nested.at(torch.inf, self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> [..., D]."""
        weights = self.nested
        high, low = (replace(plane, data=plane.data[ids], scales=plane.scales[ids]) for plane in (weights.high, weights.low))
        return replace(weights, high=high, low=low).at(torch.inf, self.dtype)


@torch.no_grad()
def nest_layers(module: nn.Module, stored: Stored, dtype: torch.dtype, device: torch.device, prefix: str = "") -> None:
    """Replace the dense and the expert layers inside `module` by nested ones, and an embedding that has planes. `prefix` and a
    name in the module are the name of a stored tensor. Raises ValueError when a checkpoint's tensors do not fit each other."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        matrix = matrix_named(f"{path}.weight")
        if isinstance(child, nn.Linear):
            kind = NestedHead if path == HEAD else NestedLinear
            weight = None if matrix.high in stored else child.weight
            setattr(module, name, kind(weight, child.bias, _read(stored, matrix, device)))
        elif isinstance(child, Experts):
            matrices = [matrix_named(f"{path}.{part}_proj") for part in ("gate_up", "down")]
            planes = (_read(stored, one, device) for one in matrices)
            setattr(module, name, NestedExperts(child, *planes, whole=matrices[0].high not in stored))
        elif isinstance(child, nn.Embedding):
            if matrix.high in stored:
                setattr(module, name, NestedEmbedding(_read(stored, matrix, device), dtype))
        elif not isinstance(child, Router):
            nest_layers(child, stored, dtype, device, f"{path}.")


@torch.no_grad()
def nest_tied(
    embedding: nn.Embedding | NestedEmbedding, stored: Stored, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Embedding | NestedEmbedding, NestedHead]:
    """The embedding and the output head of a model whose head is its embedding [V, D]."""
    planes = _read(stored, TIED_HEAD, device)
    if TIED_HEAD.high in stored:
        return NestedEmbedding(planes, dtype), NestedHead(None, None, planes)
    return embedding, NestedHead(embedding.weight, None, planes)


def matrix_named(weight: str) -> Matrix:
    """The matrix whose weights have this name: rounding of x.weight is x.rounding, of x_proj it is x_rounding."""
    stem = weight.removesuffix("weight") if weight.endswith(".weight") else weight.removesuffix("proj")
    return Matrix(weight, *(stem + part for part in PARTS))


def read_matrix(stored: Stored, matrix: Matrix, bits: int | None, dtype: torch.dtype) -> Tensor:
    """The weights [..., N, K] that so many bits stand for, in `dtype`; None for all bits."""
    if bits is None and matrix.weight in stored:
        return stored.get(matrix.weight)
    whole = stored.get(matrix.weight) if matrix.weight in stored else None
    return NestedWeights(whole, *_read(stored, matrix, torch.device("cpu"))).at(bits or torch.inf, dtype)


def read_steps(stored: Stored, matrix: Matrix, bits: int) -> Tensor:
    """How far the neighbouring values of each weight are apart at so many bits: fp32 [..., N, K]. It may be negative.

    The weights of `read_matrix` are whole multiples of it."""
    whole = matrix.weight in stored
    cols = stored.get(matrix.weight).shape[-1] if whole else 2 * stored.get(matrix.high).shape[-1]
    steps = stored.get(matrix.scales).float() / (1 if bits == min(NESTED_BITS) else STEPS)
    return steps.repeat_interleave(GROUP, dim=-1)[..., :cols]


def _read(stored: Stored, matrix: Matrix, device: torch.device) -> Planes:
    low_rounding = stored.get(matrix.low_rounding) if matrix.low_rounding in stored else None
    try:
        if matrix.high in stored:
            planes = planes_from_nibbles(*(stored.get(name) for name in (matrix.high, matrix.low, matrix.scales)))
        else:
            weights, rounding, scales = (stored.get(name) for name in (matrix.weight, matrix.rounding, matrix.scales))
            planes = read_planes(weights, rounding, scales, low_rounding)
    except ValueError as error:
        raise ValueError(f"{matrix.weight}: {error}") from error
    return _to(planes[0], device), _to(planes[1], device)


def _to(weights: QuantizedWeights, device: torch.device) -> QuantizedWeights:
    return replace(weights, data=weights.data.to(device), scales=weights.scales.to(device))


def _keep(module: nn.Module, name: str, planes: Planes) -> None:
    for plane, weights in zip(("high", "low"), planes, strict=True):
        module.register_buffer(f"{name}_{plane}", weights.data)
        module.register_buffer(f"{name}_{plane}_scales", weights.scales)
        # What else there is to know about the plane.
        setattr(module, f"{name}_{plane}_form", replace(weights, data=torch.empty(0), scales=torch.empty(0)))


def _kept(module: nn.Module, name: str, full: Tensor | None) -> NestedWeights:
    high, low = (
        replace(
            getattr(module, f"{name}_{plane}_form"),
            data=module.get_buffer(f"{name}_{plane}"),
            scales=module.get_buffer(f"{name}_{plane}_scales"),
        )
        for plane in ("high", "low")
    )
    return NestedWeights(full, high, low)


def _lay_out(module: nn.Module, name: str) -> None:
    weights = _kept(module, name, None)
    _keep(module, name, (to_words(weights.high), to_words(weights.low)))
