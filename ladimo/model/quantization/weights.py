"""Integer matrices: rounding, the stored form, and products in torch.

Legend: N rows (outputs), K columns (inputs), G groups of columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.precision import GROUP
from ladimo.model.quantization.formats import Format, find_format

# So many rows are rounded at a time, because the search for scales needs several fp32 copies of them.
ROWS_AT_ONCE = 1024


def quantize(weights: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Round weights [N, K] to integers int8 [N, K] with scales fp32 [N, G]. K must be a multiple of `GROUP`.

    Each group takes the scale with the least squared error out of the format's candidates, rounded to bf16.
    """
    groups = weights.float().unflatten(1, (-1, GROUP))
    limit = groups.abs().amax(dim=2, keepdim=True).clamp(min=1e-12)
    candidates = [scale.bfloat16().float() for scale in format.scales(groups, limit)]
    scales, best = candidates[0], torch.full_like(limit, torch.inf)
    for scale in candidates:
        rounded = (groups / scale).round().clamp(format.lowest, format.highest)
        error = (rounded * scale - groups).square().sum(dim=2, keepdim=True)
        scales = torch.where(error < best, scale, scales)
        best = torch.minimum(error, best)
    integers = (groups / scales).round().clamp(format.lowest, format.highest)
    return integers.flatten(1).to(torch.int8), scales.squeeze(2)


def dequantize(integers: Tensor, scales: Tensor) -> Tensor:
    """Integers [..., K] times scales [..., G] -> weights [..., K] in fp32. The inverse of `quantize`, up to rounding."""
    groups: Tensor = integers.float().unflatten(-1, (-1, GROUP))
    return (groups * scales.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True, slots=True)
class QuantizedWeights:
    """Integer matrices [..., N, K] as the kernels read them. Columns are padded with zeros to whole groups."""

    data: Tensor  # int8 [..., N, W]: W bytes per row, laid out by the format's `to_bytes`
    scales: Tensor  # fp32 [..., N, G]
    cols: int  # K
    format: Format

    @property
    def bits(self) -> int:
        """Bits per weight, without scales."""
        return self.format.bits

    @property
    def shape(self) -> torch.Size:
        """The shape of the matrices, [..., N, K]."""
        return torch.Size((*self.data.shape[:-1], self.cols))

    @property
    def nbytes(self) -> int:
        """Bytes of the integers and scales."""
        return self.data.nbytes + self.scales.nbytes

    def to_dtype(self, dtype: torch.dtype) -> Tensor:
        """The weights [..., N, K] that the integers stand for, in `dtype`."""
        return dequantize(self.format.to_integers(self.data), self.scales)[..., : self.cols].to(dtype)


Weights = Tensor | QuantizedWeights


def as_tensor(weights: Weights, dtype: torch.dtype) -> Tensor:
    """Tensors as they are. Integer weights become a tensor [..., N, K] in `dtype`."""
    return weights if isinstance(weights, Tensor) else weights.to_dtype(dtype)


def quantize_weights(weights: Tensor, name: str) -> QuantizedWeights:
    """`quantize` for weights [..., N, K], some rows at a time. Raises ValueError for an unknown format `name`."""
    format = find_format(name)
    rows, cols = weights.flatten(0, -2), weights.shape[-1]
    parts = 8 // format.bits
    idle = -cols % (GROUP * parts)
    data = torch.empty(len(rows), (cols + idle) // parts, dtype=torch.int8, device=weights.device)
    scales = torch.empty(len(rows), (cols + idle) // GROUP, device=weights.device)
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        some = slice(begin, begin + ROWS_AT_ONCE)
        integers, scales[some] = quantize(F.pad(rows[some], (0, idle)), format)
        data[some] = format.to_bytes(integers)
    lead = weights.shape[:-1]
    return QuantizedWeights(data.view(*lead, -1), scales.view(*lead, -1), cols, format)


def linear(x: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the transposed weights [N, K], plus bias [N] -> [..., N]."""
    return F.linear(x, weights if isinstance(weights, Tensor) else weights.to_dtype(x.dtype), bias)
