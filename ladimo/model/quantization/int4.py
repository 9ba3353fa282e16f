"""Four bits per weight. Scales may be negative, so that the largest weight of a group can become -8, whatever its sign."""

import torch
from torch import Tensor

# Factors on the scale. A smaller scale clips the largest weights, but often gives a smaller total error.
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


class Int4:
    """Byte j of a row has column j in its lower half and column j + K / 2 in its upper half, both in two's complement.

    So consecutive bytes hold two runs of consecutive columns.
    """

    name, bits, lowest, highest = "int4", 4, -8, 7

    def scales(self, groups: Tensor, limit: Tensor) -> list[Tensor]:
        extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
        ends = (limit / self.highest, torch.where(extreme > 0, -limit, limit) / -self.lowest)
        return [end * shrink for end in ends for shrink in SHRINKS]

    def to_bytes(self, integers: Tensor) -> Tensor:
        low, high = integers.chunk(2, dim=1)
        return low & 15 | high << 4

    def to_integers(self, data: Tensor) -> Tensor:
        return torch.cat((data << 4 >> 4, data >> 4), dim=-1)
