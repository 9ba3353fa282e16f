"""Weights as small integers, and only the weights: no offset, a scale per row and 32 columns, rounded when a model is loaded.

The idea is FineQuant's (arXiv 2308.09723): groups along the input dimension keep int4 usable without calibration data.

Why no library: torch's own products (`_weight_int4pack_mm`, `_weight_int8pack_mm`, which torchao calls) take dense layers only,
int4 in bf16 alone and int8 with one scale per row; none reads a stacked expert by its number, which is what makes cost follow
the routing. So the expert kernels unpack what they read, and dense layers share their format.

Legend: N rows (outputs), K columns (inputs), G groups of columns.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model import kernels

Quantize = Literal["int8", "int4"]
GROUP = 32  # columns that share a scale
LARGEST: dict[str, int] = {"int8": 127, "int4": 7}
# Rows rounded at a time: the search for scales holds several fp32 copies of them.
ROWS_AT_ONCE = 1024


def quantize(weights: Tensor, format: Quantize) -> tuple[Tensor, Tensor]:
    """Round weights [N, K] to integers with a scale per row and `GROUP` columns: int8 [N, K], fp32 [N, G]; K is a multiple of
    `GROUP`.

    No offset, to nearest. int8 runs from -127 to 127. int4 runs from -8 to 7, and a scale may be negative, so that the largest
    weight can be the -8; of a few scales each group takes the one that leaves the least squared error, as clipping often pays.
    """
    groups = weights.float().unflatten(1, (-1, GROUP))
    largest = LARGEST[format]
    limit = groups.abs().amax(dim=2, keepdim=True).clamp(min=1e-12)
    candidates = [limit / largest]
    if format == "int4":
        extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
        ends = (limit / largest, torch.where(extreme > 0, -limit, limit) / (largest + 1))
        candidates = [end * shrink for end in ends for shrink in (1.0, 0.95, 0.9, 0.85, 0.8)]
    lowest = -largest - (format == "int4")
    scales, best = candidates[0], torch.full_like(limit, torch.inf)
    for scale in candidates:
        error = ((groups / scale).round().clamp(lowest, largest) * scale - groups).square().sum(dim=2, keepdim=True)
        scales = torch.where(error < best, scale, scales)
        best = torch.minimum(error, best)
    integers = (groups / scales).round().clamp(lowest, largest)
    return integers.flatten(1).to(torch.int8), scales.squeeze(2)


def dequantize(integers: Tensor, scales: Tensor) -> Tensor:
    """The weights [..., K] in fp32 that `quantize` left."""
    groups: Tensor = integers.float().unflatten(-1, (-1, GROUP))
    return (groups * scales.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True, slots=True)
class QuantizedWeights:
    """Matrices [..., N, K] as the kernels read them; K is filled up with zeros to whole groups.

    `data` is int8. Of int8 weights a byte is one column; of int4 byte j of a row holds column j in its lower half and column
    j + data.shape[-1] in its upper half, both in two's complement, so that a run of bytes is two runs of columns.
    """

    data: Tensor  # int8 [..., N, W]: W bytes a row
    scales: Tensor  # fp32 [..., N, G]
    cols: int  # K

    @property
    def bits(self) -> int:
        return 8 * self.data.shape[-1] // (GROUP * self.scales.shape[-1])

    @property
    def shape(self) -> torch.Size:
        """Of the matrices: [..., N, K]."""
        return torch.Size((*self.data.shape[:-1], self.cols))

    @property
    def nbytes(self) -> int:
        """Scales included."""
        return self.data.nbytes + self.scales.nbytes

    def to_dtype(self, dtype: torch.dtype) -> Tensor:
        """The weights [..., N, K] that the integers stand for."""
        integers = self.data
        if self.bits == 4:
            integers = torch.cat((self.data << 4 >> 4, self.data >> 4), dim=-1)
        return dequantize(integers, self.scales)[..., : self.cols].to(dtype)


Weights = Tensor | QuantizedWeights


def storage(weights: Weights) -> Tensor:
    """The tensor that says where weights are, and whether they are trained."""
    return weights if isinstance(weights, Tensor) else weights.data


def as_tensor(weights: Weights, dtype: torch.dtype) -> Tensor:
    """Weights as they are, or what the integers stand for in `dtype`."""
    return weights if isinstance(weights, Tensor) else weights.to_dtype(dtype)


def quantize_weights(weights: Tensor, format: Quantize) -> QuantizedWeights:
    """Round weights [..., N, K], a few rows at a time. The integers are those of `quantize`."""
    rows, cols = weights.flatten(0, -2), weights.shape[-1]
    parts = 2 if format == "int4" else 1
    idle = -cols % (GROUP * parts)
    data = torch.empty(len(rows), (cols + idle) // parts, dtype=torch.int8, device=weights.device)
    scales = torch.empty(len(rows), (cols + idle) // GROUP, device=weights.device)
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        some = slice(begin, begin + ROWS_AT_ONCE)
        integers, scales[some] = quantize(F.pad(rows[some], (0, idle)), format)
        if format == "int4":
            low, high = integers.chunk(2, dim=1)
            integers = low & 15 | high << 4
        data[some] = integers
    lead = weights.shape[:-1]
    return QuantizedWeights(data.view(*lead, -1), scales.view(*lead, -1), cols)


def linear(x: Tensor, weights: QuantizedWeights, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weights [N, K], transposed, plus bias [N] -> [..., N]. Off the GPU the weights are made whole first."""
    if kernels.available(x, weights.data):
        from ladimo.model.kernels import linear as on_gpu

        return on_gpu.linear(x, weights, bias)
    return F.linear(x, weights.to_dtype(x.dtype), bias)
