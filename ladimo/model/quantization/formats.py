"""Integer formats: how groups of weights are rounded, and how the integers are stored in bytes.

A format becomes known by `register`; the loaders and `ladimo-server --quantize` then find it by name. Each back end lists the
formats that it can run: `packing.KINDS` for the compiled CPU step, `BITS` for the Triton back end.

Legend: N rows (outputs), G groups of `GROUP` columns.
"""

from typing import Protocol

from torch import Tensor


class Format(Protocol):
    """Integers of `bits` bits from `lowest` to `highest`. Each row has a scale per `GROUP` columns, and there is no offset."""

    name: str
    bits: int
    lowest: int
    highest: int

    def scales(self, groups: Tensor, limit: Tensor) -> list[Tensor]:
        """Candidates for the scales [N, G, 1] of groups [N, G, GROUP]. `limit` [N, G, 1] is the largest magnitude of each
        group.

        Each group takes the candidate with the least squared error.
        """

    def to_bytes(self, integers: Tensor) -> Tensor:
        """Integers [N, K] int8 -> the stored bytes [N, K * bits / 8] int8."""

    def to_integers(self, data: Tensor) -> Tensor:
        """The inverse of `to_bytes`. Accepts any leading dimensions."""


_FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Make a format known under its name. A format of the same name is replaced."""
    _FORMATS[format.name] = format


def find_format(name: str) -> Format:
    """The format of this name. Raises ValueError naming the known formats if it is none of them."""
    if name not in _FORMATS:
        raise ValueError(f"quantize {name!r}: supported: {', '.join(_FORMATS)}")
    return _FORMATS[name]


def format_names() -> tuple[str, ...]:
    """The names of all registered formats."""
    return tuple(_FORMATS)
