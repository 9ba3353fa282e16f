"""Packs weights for `step.c`. A panel is 16 rows. A block is up to four panels, interleaved column by column.

Legend: N rows, K columns, P panels (the last one is padded with zeros), S columns that share a scale.
"""

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.cpu.arena import Arena
from ladimo.model.cpu.pool import Pool
from ladimo.model.nested.weights import SCALE_DTYPE, NestedWeights
from ladimo.model.quantization import GROUP, QuantizedWeights, find_format

LANES, PANELS = 16, 4
# The formats that step.c can read, in the order of its enum `Kind`. The integer formats are in `ladimo.model.quantization`.
KINDS = ("float32", "bfloat16", "int8", "int4")
PLANES = "planes"  # the format of nested weights whose top is 8 bits
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


Matrix = Tensor | NestedWeights  # [N, K], or a stack [E, N, K]
Source = Matrix | tuple[Tensor, ...]  # to be packed: those of a tuple are one matrix, which has the rows of all


@dataclass(frozen=True, slots=True)
class Packer:
    """Packs with the threads of `pool`, into the memory of `arena`."""

    pool: Pool
    arena: Arena


class Rows(NamedTuple):
    """Weights where they lie in memory, which `owners` hold: the addresses of rows, int64 [..., N, 1], 0 for a row of zeros.
    `cols`: the number of columns in memory."""

    addresses: Tensor
    cols: int
    owners: Sequence[Tensor]


class Planes(NamedTuple):
    """The planes of nested weights: integers int8 [..., N, K], and scales [..., N, K / S], which are those of `high`."""

    high: Tensor
    low: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """One packed matrix, or several of the same shape in a row.

    `rows`, `panels` and `cols` are those of one matrix. `scales` has P * 16 * K / S numbers for each matrix; None for
    floating-point formats without planes. `high` and `low` are the planes of nested weights; their scales are in bf16, and
    `data` is None if there is nothing above them. `single`: the low plane once more, for reading single neurons or words
    (`refine.h`); bytes [E, ...].
    """

    data: Tensor | None
    scales: Tensor | None
    rows: int
    panels: int
    cols: int
    format: str
    high: Tensor | None = None
    low: Tensor | None = None
    single: Tensor | None = None


def pack(weights: Source, format: str, packer: Packer, single: bool = False) -> Packed:
    """Pack weights in `format`, and besides, if they are nested, their planes. K must be even, and for integer formats and for
    nested weights a multiple of `GROUP`. `single`: rows of nested weights can be read alone."""
    planes = _planes(weights)
    packed = _pack(_full(weights), _cols(weights), format, planes, packer)
    return replace(packed, single=_single_rows(planes)[None]) if single and planes is not None else packed


def pack_gate_up(gate_up: Source, format: str, packer: Packer, gated: bool = True) -> Packed:
    """Pack [E, 2F, D], in which gate rows come before up rows. Each block gets two panels of gate rows and two of up rows. Not
    `gated`: [E, F, D] of up rows only, which get whole blocks. Both have rows of zeros up to `padded_size`.
    Neurons of nested weights can be read alone if these are stored whole. Otherwise memory counts for more."""
    full, planes, parts = _full(gate_up), _planes(gate_up), 2 if gated else 1
    some = full.addresses if full is not None else planes.high if planes is not None else None
    assert some is not None
    size = padded_size(some.shape[1] // parts, format, nested=planes is not None)
    arrange = _pair_panels if gated else _fill_rows
    whole = None if full is None else full._replace(addresses=arrange(full.addresses, size))
    if planes is None:
        return _pack(whole, _cols(gate_up), format, None, packer)
    packed = _pack(whole, _cols(gate_up), format, Planes(*(arrange(plane, size) for plane in planes)), packer)
    if whole is None:
        return packed
    rows = (torch.cat([_fill_rows(part, size) for part in plane.chunk(parts, dim=1)], dim=1) for plane in planes)
    return replace(packed, single=_single_rows(Planes(*rows)))


def pack_down(down: Source, format: str, packer: Packer) -> Packed:
    """Pack [E, D, F], with columns of zeros for the neurons that `pack_gate_up` adds. Neurons can be read alone as there."""
    whole, planes = _full(down), _planes(down)
    size = padded_size(_cols(down), format, nested=planes is not None)
    idle = size - _cols(down)
    if planes is None:
        return _pack(whole, size, format, None, packer)
    planes = Planes(F.pad(planes.high, (0, idle)), F.pad(planes.low, (0, idle)), planes.scales)
    packed = _pack(whole, size, format, planes, packer)
    return packed if whole is None else replace(packed, single=_single_columns(planes))


def stack_rows(matrices: Sequence[Matrix]) -> Source:
    """Matrices [N, K] as one, which has the rows of all. Either all of them are nested or none."""
    nested = [one for one in matrices if isinstance(one, NestedWeights)]
    if not nested:
        return tuple(one for one in matrices if isinstance(one, Tensor))
    whole = [one.full for one in nested if one.full is not None]
    full = torch.cat(whole) if whole else None
    return NestedWeights(full, _stack_planes([one.high for one in nested]), _stack_planes([one.low for one in nested]))


def columns_multiple(format: str, nested: bool) -> int:
    """The number of columns must be a multiple of this: bf16 is read in pairs, and a group of integers shares a scale."""
    return GROUP if nested or format not in FLOATS else 2


def padded_size(size: int, format: str, nested: bool) -> int:
    """The neurons of an expert, after padding with zeros to whole panels and whole groups."""
    multiple = max(LANES, columns_multiple(format, nested))
    return -(-size // multiple) * multiple


def _full(weights: Source) -> Rows | None:
    full = weights.full if isinstance(weights, NestedWeights) else weights
    if full is None:
        return None
    given = (full,) if isinstance(full, Tensor) else full
    owners = [(one if one.dtype in FLOATS.values() else one.float()).detach().contiguous() for one in given]
    assert len({one.dtype for one in owners}) == 1
    addresses = []
    for one in owners:
        rows = torch.arange(one[..., 0].numel()) * (one.shape[-1] * one.itemsize) + one.data_ptr()
        addresses.append(rows.view(*one.shape[:-1], 1))
    return Rows(torch.cat(addresses, dim=-2), _cols(weights), owners)


def _cols(weights: Source) -> int:
    return (weights[0] if isinstance(weights, tuple) else weights).shape[-1]


def _planes(weights: Source) -> Planes | None:
    """The planes as numbers; None if the weights are not nested. The last group of a row may have fewer than S columns."""
    if not isinstance(weights, NestedWeights):
        return None
    groups = -(-weights.shape[-1] // GROUP)
    return Planes(_integers(weights.high), _integers(weights.low), weights.high.scales[..., :groups])


def _integers(plane: QuantizedWeights) -> Tensor:
    return plane.format.to_integers(plane.data)[..., : plane.cols]


def _stack_planes(planes: Sequence[QuantizedWeights]) -> QuantizedWeights:
    data, scales = (torch.cat(parts) for parts in zip(*((one.data, one.scales) for one in planes), strict=True))
    return replace(planes[0], data=data, scales=scales)


def _pack(weights: Rows | None, cols: int, format: str, planes: Planes | None, packer: Packer) -> Packed:
    """Weights, planes, or both: matrices [N, K] or stacks of them. `cols`: K, with columns of zeros that are added."""
    some = planes.high if weights is None and planes is not None else weights.addresses if weights is not None else None
    assert some is not None and cols % columns_multiple(format, nested=planes is not None) == 0
    rows = some.shape[-2]
    packed = Packed(None, None, rows, -(-rows // LANES), cols, PLANES)
    if weights is not None:
        data, scales = _pack_rows(weights, cols, format, packer)
        packed = replace(packed, data=data, scales=scales, format=format)
    if planes is None:
        return packed
    assert packed.scales is None, "planes go beside whole weights"
    high, low = (torch.cat([_pack_integers(one) for one in _in_panels(plane)]) for plane in (planes.high, planes.low))
    scales = torch.cat([_interleave(one.to(SCALE_DTYPE), torch.int16) for one in _in_panels(planes.scales)])
    return replace(packed, scales=scales, high=high, low=low)


def _pair_panels(gate_up: Tensor, size: int) -> Tensor:
    """[E, 2F, ...] -> [E, 2 size, ...]: both halves are padded with zeros, and their panels alternate in pairs."""
    halves = (_fill_rows(half, size) for half in gate_up.chunk(2, dim=1))
    gate, up = (half.unflatten(1, (-1, LANES)).split(PANELS // 2, dim=1) for half in halves)
    pairs = [torch.cat(both, dim=1) for both in zip(gate, up, strict=True)]
    return torch.cat(pairs, dim=1).flatten(1, 2)


def _fill_rows(matrices: Tensor, size: int) -> Tensor:
    """[E, N, ...] -> [E, size, ...], with zeros."""
    return F.pad(matrices, (0, 0, 0, size - matrices.shape[1]))


def _single_rows(planes: Planes) -> Tensor:
    """The low plane [..., N, K] by rows, as `refine.h` wants them: bytes [..., N, 18 K / 32]."""
    groups = (planes.low + 8).view(torch.uint8).unflatten(-1, (-1, 2, GROUP // 2))
    halves = groups[..., 0, :] | groups[..., 1, :] << 4
    scales = planes.scales.to(SCALE_DTYPE).contiguous().view(torch.uint8)
    return torch.cat((halves.flatten(-2), scales), dim=-1)


def _single_columns(planes: Planes) -> Tensor:
    """The low plane [E, D, F] by columns, as `refine.h` wants them: bytes [E, F / 32, 18 D], D filled up to whole blocks."""
    block = PANELS * LANES
    idle = -planes.low.shape[1] % block
    low = F.pad(planes.low, (0, 0, 0, idle)).transpose(1, 2)  # [E, F, D]
    parts = (low + 8).view(torch.uint8).unflatten(-1, (-1, 4, 2, 8))  # blocks, bytes of a word, halves of a byte, words
    words = (parts[..., 0, :] | parts[..., 1, :] << 4).transpose(-1, -2)
    columns = words.flatten(2).unflatten(1, (-1, GROUP)).flatten(-2)  # [E, F / 32, 16 D]
    scales = F.pad(planes.scales, (0, 0, 0, idle)).transpose(1, 2).to(SCALE_DTYPE).contiguous().view(torch.uint8)
    return torch.cat((scales, columns), dim=-1)


def _in_panels(weights: Tensor) -> Iterator[Tensor]:
    """The matrices of a stack [E, N, ...], or the only one [N, ...], each padded to [16 P, ...]."""
    for matrix in weights if weights.ndim == 3 else weights[None]:
        yield F.pad(matrix, (0, 0, 0, -len(matrix) % LANES))


class _Packing(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("rows", "data", "scales")] + [
        (name, c_int64) for name in ("matrices", "panels", "given_cols", "cols", "bf16", "kind")
    ]


def _pack_rows(weights: Rows, cols: int, format: str, packer: Packer) -> tuple[Tensor, Tensor | None]:
    """Pack matrices. Returns their bytes and their scales (None for floating-point formats). Integers are rounded as
    `quantization.quantize` does it."""
    addresses = torch.stack(list(_in_panels(weights.addresses)))  # [E, 16 P, 1]
    count = addresses.numel() * cols
    bits = FLOATS[format].itemsize * 8 if format in FLOATS else find_format(format).bits
    data = packer.arena.empty(count * bits // 8, torch.uint8)
    scales = None if format in FLOATS else packer.arena.empty(count // GROUP, SCALE_DTYPE)
    pack_matrices = packer.pool.code.ladimo_pack
    pack_matrices.argtypes, pack_matrices.restype = [c_void_p, ctypes.POINTER(_Packing)], None
    pack_matrices(
        packer.pool.handle,
        _Packing(
            addresses.data_ptr(),
            data.data_ptr(),
            None if scales is None else scales.data_ptr(),
            len(addresses),
            addresses.shape[1] // LANES,
            weights.cols,
            cols,
            weights.owners[0].dtype == torch.bfloat16,
            KINDS.index(format),
        ),
    )
    return data, scales


def _pack_integers(integers: Tensor) -> Tensor:
    """The bytes of one matrix of integers of four bits, int8 [16 P, K]."""
    # Of each 8 columns, the first four go to the lower halves of the bytes.
    low, high = (integers + 8).view(torch.uint8).unflatten(1, (-1, 2, 4)).unbind(2)
    return _interleave((low | high << 4).flatten(1)).view(torch.uint8)


def _interleave(matrix: Tensor, word: torch.dtype = torch.int32) -> Tensor:
    """[16 P, ...] -> flat words. In each block, the first words of all its rows come first, then the second ones, and so on."""
    words = matrix.contiguous().view(word)
    out = torch.empty_like(words).flatten()
    begin = 0
    for block in words.split(PANELS * LANES):
        out[begin : begin + block.numel()].view(block.shape[1], -1).copy_(block.t())
        begin += block.numel()
    return out
