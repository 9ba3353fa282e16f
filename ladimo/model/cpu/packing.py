"""Packs weights for `step.c`. A panel is 16 rows. A block is up to four panels, interleaved column by column.

Legend: N rows, K columns, P panels (the last one is padded with zeros), S columns that share a scale.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.nested import NestedWeights
from ladimo.model.quantization import GROUP, QuantizedWeights, find_format, quantize

LANES, PANELS = 16, 4
# The formats that step.c can read, in the order of its enum `Kind`. The integer formats are in `ladimo.model.quantization`.
KINDS = ("float32", "bfloat16", "int8", "int4")
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Planes(NamedTuple):
    """The planes of nested weights: integers int8 [..., N, K], and scales fp32 [..., N, K / S], which are those of `high`."""

    high: Tensor
    low: Tensor
    scales: Tensor


def planes_of(weights: NestedWeights) -> Planes:
    """The planes of matrices [..., N, K]. The last group of a row may have fewer than S columns."""
    groups = -(-weights.shape[-1] // GROUP)
    return Planes(_integers(weights.high), _integers(weights.low), weights.high.scales[..., :groups])


def _integers(plane: QuantizedWeights) -> Tensor:
    return plane.format.to_integers(plane.data)[..., : plane.cols]


@dataclass(frozen=True, slots=True)
class Packed:
    """One packed matrix, or several of the same shape in a row.

    `rows`, `panels` and `cols` are those of one matrix. `scales` has P * 16 * K / S numbers for each matrix; None for
    floating-point formats without planes. `high` and `low` are the planes of nested weights.
    """

    data: Tensor
    scales: Tensor | None
    rows: int
    panels: int
    cols: int
    format: str
    high: Tensor | None = None
    low: Tensor | None = None


def pack(weights: Tensor, format: str, planes: Planes | None = None) -> Packed:
    """Pack a matrix [N, K] or a stack [E, N, K], with its planes if it is nested. K must be even, and for integer formats and
    planes a multiple of `GROUP`."""
    rows, cols = weights.shape[-2:]
    assert cols % columns_multiple(format, nested=planes is not None) == 0
    data, scales = _join([_pack_one(matrix, format) for matrix in _in_panels(weights)])
    packed = Packed(data, scales, rows, -(-rows // LANES), cols, format)
    if planes is None:
        return packed
    assert scales is None, "planes go beside whole weights"
    steps = list(_in_panels(planes.scales))
    high, scales = _join([_pack_integers(*one, "int4") for one in zip(_in_panels(planes.high), steps, strict=True)])
    low, _ = _join([_pack_integers(*one, "int4") for one in zip(_in_panels(planes.low), steps, strict=True)])
    return replace(packed, scales=scales, high=high, low=low)


def pack_gate_up(gate_up: Tensor, format: str, planes: Planes | None = None) -> Packed:
    """Pack [E, 2F, D], in which gate rows come before up rows. Each block gets two panels of gate rows and two of up rows."""
    size = padded_size(gate_up.shape[1] // 2, format, nested=planes is not None)
    planes = planes and Planes(*(_pair_panels(plane, size) for plane in planes))
    return pack(_pair_panels(gate_up, size), format, planes)


def pack_down(down: Tensor, format: str, planes: Planes | None = None) -> Packed:
    """Pack [E, D, F], with columns of zeros for the neurons that `pack_gate_up` adds."""
    idle = padded_size(down.shape[2], format, nested=planes is not None) - down.shape[2]
    if planes is not None:
        planes = Planes(F.pad(planes.high, (0, idle)), F.pad(planes.low, (0, idle)), planes.scales)
    return pack(F.pad(down, (0, idle)), format, planes)


def columns_multiple(format: str, nested: bool) -> int:
    """The number of columns must be a multiple of this: bf16 is read in pairs, and a group of integers shares a scale."""
    return GROUP if nested or format not in FLOATS else 2


def padded_size(size: int, format: str, nested: bool) -> int:
    """The neurons of an expert, after padding with zeros to whole panels and whole groups."""
    multiple = max(LANES, columns_multiple(format, nested))
    return -(-size // multiple) * multiple


def _pair_panels(gate_up: Tensor, size: int) -> Tensor:
    """[E, 2F, ...] -> [E, 2 size, ...]: both halves are padded with zeros, and their panels alternate in pairs."""
    halves = (F.pad(half, (0, 0, 0, size - half.shape[1])) for half in gate_up.chunk(2, dim=1))
    gate, up = (half.unflatten(1, (-1, LANES)).split(PANELS // 2, dim=1) for half in halves)
    pairs = [torch.cat(both, dim=1) for both in zip(gate, up, strict=True)]
    return torch.cat(pairs, dim=1).flatten(1, 2)


def _in_panels(weights: Tensor) -> Iterator[Tensor]:
    """The matrices of a stack [E, N, ...], or the only one [N, ...], each padded to [16 P, ...]."""
    for matrix in weights if weights.ndim == 3 else weights[None]:
        yield F.pad(matrix, (0, 0, 0, -len(matrix) % LANES))


def _join(parts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """The bytes of all matrices one after another, and their scales, if they have scales."""
    scales = [part for _, part in parts if part is not None]
    return torch.cat([data for data, _ in parts]), torch.cat(scales) if scales else None


def _pack_one(matrix: Tensor, format: str) -> tuple[Tensor, Tensor | None]:
    """Pack one matrix [16 P, K]. Returns its bytes and its scales (None for floating-point formats)."""
    if format in FLOATS:
        return _interleave(matrix.to(FLOATS[format])).view(torch.uint8), None
    return _pack_integers(*quantize(matrix, find_format(format)), format)


def _pack_integers(integers: Tensor, scales: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Pack one matrix of integers [16 P, K] and its scales [16 P, K / S]."""
    if format == "int4":  # of each 8 columns, the first four go to the lower halves of the bytes
        low, high = (integers + 8).view(torch.uint8).unflatten(1, (-1, 2, 4)).unbind(2)
        words = (low | high << 4).flatten(1)
    else:
        words = integers.view(torch.uint8) ^ 0x80  # adds 128
    return _interleave(words).view(torch.uint8), _interleave(scales).view(torch.float32)


def _interleave(matrix: Tensor) -> Tensor:
    """[16 P, ...] -> flat words of 32 bits. In each block, the first words of all its rows come first, then the second ones,
    and so on."""
    words = matrix.contiguous().view(torch.int32)
    out = torch.empty_like(words).flatten()
    begin = 0
    for block in words.split(PANELS * LANES):
        out[begin : begin + block.numel()].view(block.shape[1], -1).copy_(block.t())
        begin += block.numel()
    return out
