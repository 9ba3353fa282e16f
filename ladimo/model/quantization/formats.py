"""What an integer format is: how groups of weights are rounded, and how the integers lie in bytes.

A format is an object that calls `register`. Back ends state which formats they run (`packing.KINDS` for the compiled CPU step,
`BITS` of the Triton back end); `server --quantize` and the loaders know every registered one by name.

Legend: N rows (outputs), G groups of `GROUP` columns.
"""

from typing import Protocol

from torch import Tensor

GROUP = 32  # columns that share a scale


class Format(Protocol):
    """Integers from `lowest` to `highest`, with a scale per row and `GROUP` columns and no offset."""

    name: str
    bits: int
    lowest: int
    highest: int

    def scales(self, groups: Tensor, limit: Tensor) -> list[Tensor]:
        """Scales to try for groups [N, G, GROUP] whose largest magnitudes are `limit` [N, G, 1]. Each group takes the one that
        leaves the least squared error."""

    def to_bytes(self, integers: Tensor) -> Tensor:
        """Integers [N, K] int8 as stored, [N, K * bits / 8] int8."""

    def to_integers(self, data: Tensor) -> Tensor:
        """The inverse of `to_bytes`, for any leading dimensions."""


_FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Make a format known under its name. A format of the same name is replaced."""
    _FORMATS[format.name] = format


def find_format(name: str) -> Format:
    """Raises ValueError naming the known formats when this is none of them."""
    if name not in _FORMATS:
        raise ValueError(f"quantize {name!r}: supported: {', '.join(_FORMATS)}")
    return _FORMATS[name]


def format_names() -> tuple[str, ...]:
    return tuple(_FORMATS)
