"""One set of weights at several precisions: the weights themselves, and two planes of four bits each, one below the other.

    4 bits: scale * high             high in -8 .. 7, chosen by the conversion
    8 bits: scale * (high + low / STEPS)   low in -8 .. 7, what the high plane leaves of the weight, rounded by the conversion

A group of 32 columns of a row shares a scale. Whoever wants 8 bits reads the high plane, as everybody does, and the low plane
beside it: a batch of both reads each plane once. The policy's rule says which precision a token gets (`RuleNumber.BITS`).

A checkpoint keeps the weights, the scales and two bits per weight. They say whether `high` is the weight rounded up or rounded
down, and whether `low` is what then remains, rounded up or rounded down. The planes follow from these. A checkpoint without the
second bit has the nearest `low`. A checkpoint whose top is 8 bits keeps the planes themselves, and no weights.

Nested integer formats: MatQuant (arXiv 2502.06786), Any-Precision LLM (arXiv 2402.10517). Here the planes are chosen by error
feedback (GPTQ, arXiv 2210.17323). The top is the source, unchanged, or these 8 bits.

Legend: N rows (outputs), K columns (inputs), P columns filled up with zeros to whole groups, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.precision import GROUP, NESTED_BITS
from ladimo.model.quantization import QuantizedWeights, find_format

STEPS = 8  # of the low plane in one of the high plane: its ends reach one whole step up and down
LOWEST, HIGHEST = -8, 7
SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class NestedWeights:
    """Matrices [..., N, K] at 4 bits (`high`), 8 bits (`high` and `low`) and whole (`full`). `full`: None where the top is 8
    bits."""

    full: Tensor | None
    high: QuantizedWeights
    low: QuantizedWeights

    @property
    def shape(self) -> torch.Size:
        return self.high.shape

    def at(self, bits: float, dtype: torch.dtype) -> Tensor:
        """The matrices that so many bits stand for. More than 8 are the weights themselves, or 8 where there are none."""
        if bits > max(NESTED_BITS) and self.full is not None:
            return self.full
        high = self.high.to_dtype(torch.float32)
        return (high if bits <= min(NESTED_BITS) else high + self.low.to_dtype(torch.float32)).to(dtype)


def codes_to_rounding(codes: Tensor, lowest: Tensor) -> Tensor:
    """What a checkpoint keeps of a plane: integers [N, P], each its number rounded down, `lowest` [N, P], or one more -> uint8
    [N, P / 8].

    Byte j of a row holds columns 8 j to 8 j + 7, the first in its lowest bit. A set bit is a number rounded up.
    """
    up = codes - lowest
    assert int(up.min()) >= 0 and int(up.max()) <= 1, "neither rounded down nor up"
    shifted: Tensor = up.to(torch.uint8).unflatten(-1, (-1, 8)) << torch.arange(8, dtype=torch.uint8)
    return shifted.sum(dim=-1, dtype=torch.uint8)


def rounding_to_codes(rounding: Tensor, lowest: Tensor) -> Tensor:
    """The inverse of `codes_to_rounding`: integers [N, P] in int8."""
    up = (rounding.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)
    return lowest + up.to(torch.int8)


def rounded_down(weights: Tensor, scales: Tensor) -> Tensor:
    """The high plane's integers at or below the weights [N, K], int8 [N, P]. Exact: IEEE division gives the same everywhere."""
    codes: Tensor = _in_steps(weights, scales).floor().clamp(LOWEST, HIGHEST).flatten(-2)
    return codes.to(torch.int8)


def low_rounded_down(weights: Tensor, high: Tensor, scales: Tensor) -> Tensor:
    """The low plane's integers at or below what the high plane [N, P] leaves of the weights [N, K]: int8 [N, P]."""
    codes: Tensor = _left(weights, high, scales).floor().clamp(LOWEST, HIGHEST)
    return codes.to(torch.int8)


def low_plane(weights: Tensor, high: Tensor, scales: Tensor) -> Tensor:
    """The integers int8 [N, P] that bring the high plane [N, P] nearest to the weights [N, K]."""
    codes: Tensor = _left(weights, high, scales).round().clamp(LOWEST, HIGHEST)
    return codes.to(torch.int8)


def _left(weights: Tensor, high: Tensor, scales: Tensor) -> Tensor:
    """What the high plane [N, P] leaves of the weights [N, K], in steps of the low plane: fp32 [N, P]."""
    steps: Tensor = ((_in_steps(weights, scales) - high.unflatten(-1, (-1, GROUP))) * STEPS).flatten(-2)
    return steps


def _in_steps(weights: Tensor, scales: Tensor) -> Tensor:
    """Weights [N, K] in steps of the high plane: fp32 [N, P / 32, 32]."""
    padded: Tensor = F.pad(weights.float(), (0, -weights.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    return padded / scales.float().unsqueeze(-1)


def read_planes(
    weights: Tensor, rounding: Tensor, scales: Tensor, low_rounding: Tensor | None = None
) -> tuple[QuantizedWeights, QuantizedWeights]:
    """Stored weights [..., N, K], rounding [..., N, P / 8] of both planes and scales [..., N, P / 32] -> the high and the low
    plane. Without `low_rounding` the low plane is rounded to the nearest.

    Raises ValueError when the shapes do not belong together.
    """
    *lead, cols = weights.shape
    groups = -(-cols // GROUP)
    for name, bits in (("rounding", rounding), ("low_rounding", low_rounding)):
        if bits is not None and (list(bits.shape) != [*lead, groups * GROUP // 8] or bits.dtype != torch.uint8):
            raise ValueError(f"{name} is {bits.dtype} {list(bits.shape)}, must be uint8 {[*lead, groups * GROUP // 8]}")
    _check_scales(scales, lead, cols)
    flat, flat_scales = weights.flatten(0, -2), scales.flatten(0, -2).float()
    high = rounding_to_codes(rounding.flatten(0, -2), rounded_down(flat, flat_scales))
    if low_rounding is None:
        low = low_plane(flat, high, flat_scales)
    else:
        low = rounding_to_codes(low_rounding.flatten(0, -2), low_rounded_down(flat, high, flat_scales))
    return _planes(high.view(*lead, -1), low.view(*lead, -1), scales, cols)


def plane_to_nibbles(codes: Tensor) -> Tensor:
    """A plane as a checkpoint without weights keeps it: integers [..., K] -> uint8 [..., K / 2]. Byte j holds column 2 j in its
    lower half and column 2 j + 1 in its upper half, each plus 8. K is even."""
    shifted = (codes - LOWEST).to(torch.uint8)
    nibbles: Tensor = shifted[..., 0::2] | shifted[..., 1::2] << 4
    return nibbles


def planes_from_nibbles(high: Tensor, low: Tensor, scales: Tensor) -> tuple[QuantizedWeights, QuantizedWeights]:
    """Stored planes [..., N, K / 2] and scales [..., N, P / 32] -> the planes. Raises ValueError when the shapes do not belong
    together."""
    cols = 2 * high.shape[-1]
    for name, plane in (("high", high), ("low", low)):
        if plane.shape != high.shape or plane.dtype != torch.uint8:
            raise ValueError(f"{name} is {plane.dtype} {list(plane.shape)}, must be uint8 {list(high.shape)}")
    _check_scales(scales, list(high.shape[:-1]), cols)

    def codes(plane: Tensor) -> Tensor:
        integers = torch.stack((plane & 15, plane >> 4), dim=-1).flatten(-2).to(torch.int8) + LOWEST
        return F.pad(integers, (0, -cols % GROUP))

    return _planes(codes(high), codes(low), scales, cols)


def _check_scales(scales: Tensor, lead: list[int], cols: int) -> None:
    groups = -(-cols // GROUP)
    if list(scales.shape) != [*lead, groups] or scales.dtype != SCALE_DTYPE:
        raise ValueError(f"scales are {scales.dtype} {list(scales.shape)}, must be {SCALE_DTYPE} {[*lead, groups]}")


def _planes(high: Tensor, low: Tensor, scales: Tensor, cols: int) -> tuple[QuantizedWeights, QuantizedWeights]:
    """Integers [..., P] and scales [..., P / 32] as the kernels read them."""
    format = find_format("int4")
    idle = scales.shape[-1] % 2  # a row of the int4 format is whole groups in pairs

    def plane(integers: Tensor, steps: Tensor) -> QuantizedWeights:
        data = format.to_bytes(F.pad(integers, (0, idle * GROUP)).flatten(0, -2))
        return QuantizedWeights(data.view(*integers.shape[:-1], -1), F.pad(steps, (0, idle)), cols, format)

    return plane(high, scales.float()), plane(low, scales.float() / STEPS)


def by_precision(bits: Tensor, tokens: Callable[[Tensor, float], Tensor], x: Tensor) -> Tensor:
    """Run tokens at each precision that is wanted: `tokens(x [n, ...], bits)` for those of x [T, ...] that want it, bits [T].

    The reference. On a CPU it reads only the precisions that some token wants. On a device all tokens run at all precisions,
    without waiting for it, so that a step can be captured.
    """
    wanted = torch.where(bits <= NESTED_BITS[0], 4.0, torch.where(bits <= NESTED_BITS[1], 8.0, torch.inf))
    if x.device.type != "cpu":
        at4, at8, whole = (tokens(x, value) for value in (4.0, 8.0, torch.inf))
        wanted = wanted.view(-1, *[1] * (whole.ndim - 1))
        return torch.where(wanted == 4, at4, torch.where(wanted == 8, at8, whole))
    present = wanted.unique().tolist()
    if len(present) <= 1:
        return tokens(x, present[0] if present else 4.0)
    parts = [(rows, tokens(x[rows], value)) for value in present for rows in [(wanted == value).nonzero().flatten()]]
    out = parts[0][1].new_empty(len(x), *parts[0][1].shape[1:])
    for rows, part in parts:
        out[rows] = part
    return out
