"""Weights as `step.c` reads them: panels of 16 rows, up to four panels interleaved column by column into a block.

Legend: N rows, K columns, P panels (16 rows each, the last padded with zeros), S columns that share a scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.quantization import GROUP, find_format, quantize

LANES, PANELS = 16, 4
# The formats that step.c reads, in its order: two of floating point, then those of `ladimo.model.quantization`.
KINDS = ("float32", "bfloat16", "int8", "int4")
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Packed:
    """One matrix, or equal ones behind each other; `rows`, `panels`, `cols` are of one. `scales`: P * 16 * K / S of each."""

    data: Tensor
    scales: Tensor | None
    rows: int
    panels: int
    cols: int
    format: str


def pack(weights: Tensor, format: str) -> Packed:
    """Pack weights [N, K] or equally large matrices [E, N, K]; K is even, and a multiple of `GROUP` for the integer formats."""
    stacked = weights if weights.ndim == 3 else weights[None]
    _, rows, cols = stacked.shape
    assert cols % columns_multiple(format) == 0
    panels = -(-rows // LANES)
    parts = [_pack_one(F.pad(matrix, (0, 0, 0, panels * LANES - rows)), format) for matrix in stacked]
    scales = torch.cat([part for _, part in parts if part is not None]) if format not in FLOATS else None
    return Packed(torch.cat([data for data, _ in parts]), scales, rows, panels, cols, format)


def pack_gate_up(gate_up: Tensor, format: str) -> Packed:
    """Pack [E, 2F, D], gate rows before up rows, with two panels of gate and two of up rows in each block."""
    experts, _, cols = gate_up.shape
    size = padded_size(gate_up.shape[1] // 2, format)
    gate, up = (F.pad(half, (0, 0, 0, size - half.shape[1])).view(experts, -1, LANES, cols) for half in gate_up.chunk(2, dim=1))
    half_block = PANELS // 2
    pairs = [torch.cat(both, dim=1) for both in zip(gate.split(half_block, 1), up.split(half_block, 1), strict=True)]
    return pack(torch.cat(pairs, dim=1).flatten(1, 2), format)


def columns_multiple(format: str) -> int:
    """What the number of columns must be a multiple of: pairs of bf16 are read together, and groups share a scale."""
    return 2 if format in FLOATS else GROUP


def padded_size(size: int, format: str) -> int:
    """An expert's size, padded with idle neurons to whole panels and whole groups of scales."""
    multiple = max(LANES, columns_multiple(format))
    return -(-size // multiple) * multiple


def _pack_one(matrix: Tensor, format: str) -> tuple[Tensor, Tensor | None]:
    """One matrix [16 P, K] -> its bytes, and its scales."""
    if format in FLOATS:
        return _interleave(matrix.to(FLOATS[format])).view(torch.uint8), None
    integers, scales = quantize(matrix, find_format(format))
    if format == "int4":  # of each 8 columns the first four are the lower halves of the bytes
        low, high = (integers + 8).view(torch.uint8).unflatten(1, (-1, 2, 4)).unbind(2)
        words = (low | high << 4).flatten(1)
    else:
        words = integers.view(torch.uint8) ^ 0x80  # plus 128
    return _interleave(words).view(torch.uint8), _interleave(scales).view(torch.float32)


def _interleave(matrix: Tensor) -> Tensor:
    """[16 P, ...] -> flat words of 32 bits; in each block, word by word of the rows, its rows."""
    words = matrix.contiguous().view(torch.int32)
    out = torch.empty_like(words).flatten()
    begin = 0
    for block in words.split(PANELS * LANES):
        out[begin : begin + block.numel()].view(block.shape[1], -1).copy_(block.t())
        begin += block.numel()
    return out
