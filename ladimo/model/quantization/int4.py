"""Four bits per weight. A scale may be negative, so that a group's largest weight can be the -8."""

import torch
from torch import Tensor

# Clipping the largest weights often leaves less error in all.
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


class Int4:
    """Byte j of a row holds column j in its lower half and column j + K / 2 in its upper half, both in two's complement. So a
    run of bytes is two runs of columns."""

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
