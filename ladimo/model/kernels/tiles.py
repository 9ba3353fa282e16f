"""The size of a kernel's work."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """The work of one program: `m` tokens times `n` output columns.

    Each iteration reads `k` stored elements of a weight row. `num_warps` and `num_stages` are Triton's launch options.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int = 1
