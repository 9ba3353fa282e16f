"""Eight bits per weight."""

from torch import Tensor


class Int8:
    """A byte is one column, in two's complement."""

    name, bits, lowest, highest = "int8", 8, -127, 127

    def scales(self, groups: Tensor, limit: Tensor) -> list[Tensor]:
        return [limit / self.highest]

    def to_bytes(self, integers: Tensor) -> Tensor:
        return integers

    def to_integers(self, data: Tensor) -> Tensor:
        return data
