"""Packs weights for `step.c`. A panel is 16 rows. A block is up to four panels, interleaved column by column.

Legend: N rows, K columns, P panels (the last one is padded with zeros), S columns that share a scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.quantization import GROUP, find_format, quantize

LANES, PANELS = 16, 4
# The formats that step.c can read, in the order of its enum `Kind`. The integer formats are in `ladimo.model.quantization`.
KINDS = ("float32", "bfloat16", "int8", "int4")
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Packed:
    """One packed matrix, or several of the same shape in a row.

    `rows`, `panels` and `cols` are those of one matrix. `scales` has P * 16 * K / S numbers for each matrix; None for
    floating-point formats.
    """

    data: Tensor
    scales: Tensor | None
    rows: int
    panels: int
    cols: int
    format: str


def pack(weights: Tensor, format: str) -> Packed:
    """Pack a matrix [N, K] or a stack [E, N, K]. K must be even, and for integer formats a multiple of `GROUP`."""
    stacked = weights if weights.ndim == 3 else weights[None]
    _, rows, cols = stacked.shape
    assert cols % columns_multiple(format) == 0
    panels = -(-rows // LANES)
    parts = [_pack_one(F.pad(matrix, (0, 0, 0, panels * LANES - rows)), format) for matrix in stacked]
    scales = torch.cat([part for _, part in parts if part is not None]) if format not in FLOATS else None
    return Packed(torch.cat([data for data, _ in parts]), scales, rows, panels, cols, format)


def pack_gate_up(gate_up: Tensor, format: str) -> Packed:
    """Pack [E, 2F, D], in which gate rows come before up rows. Each block gets two panels of gate rows and two of up rows."""
    experts, _, cols = gate_up.shape
    size = padded_size(gate_up.shape[1] // 2, format)
    gate, up = (F.pad(half, (0, 0, 0, size - half.shape[1])).view(experts, -1, LANES, cols) for half in gate_up.chunk(2, dim=1))
    half_block = PANELS // 2
    pairs = [torch.cat(both, dim=1) for both in zip(gate.split(half_block, 1), up.split(half_block, 1), strict=True)]
    return pack(torch.cat(pairs, dim=1).flatten(1, 2), format)


def columns_multiple(format: str) -> int:
    """The number of columns must be a multiple of this: bf16 is read in pairs, and a group of integers shares a scale."""
    return 2 if format in FLOATS else GROUP


def padded_size(size: int, format: str) -> int:
    """The neurons of an expert, after padding with zeros to whole panels and whole groups."""
    multiple = max(LANES, columns_multiple(format))
    return -(-size // multiple) * multiple


def _pack_one(matrix: Tensor, format: str) -> tuple[Tensor, Tensor | None]:
    """Pack one matrix [16 P, K]. Returns its bytes and its scales (None for floating-point formats)."""
    if format in FLOATS:
        return _interleave(matrix.to(FLOATS[format])).view(torch.uint8), None
    integers, scales = quantize(matrix, find_format(format))
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
