"""The numbers of a policy's rule: the one definition that JSON, Python, the Triton kernels and the compiled CPU step read.

To add a number: a member here, a field of `LayerRule`, and its effect in the three forms of the rule (`model/routing.py`,
`model/kernels/routing.py`, `model/cpu/experts.h`).
"""

import math
from dataclasses import dataclass
from enum import IntEnum


@dataclass(frozen=True, slots=True)
class Spec:
    """What policy JSON may say: a value of this kind from `lowest` to `highest`, and null where `nullable`: no limit.

    `of_experts`: the number counts experts of the layer, so it cannot exceed how many there are.
    """

    kind: type[int | float]  # int, float or bool
    lowest: float = 0.0
    highest: float = math.inf
    nullable: bool = False
    of_experts: bool = False

    def __str__(self) -> str:
        """As in "must be ..."."""
        if self.kind is bool:
            return "true or false"
        kind = "an integer" if self.kind is int else "a number"
        if self.highest < math.inf:
            return f"{kind} between {self.lowest:g} and {self.highest:g}"
        return f"{kind} of at least {self.lowest:g}"


class RuleNumber(IntEnum):
    """A number of a rule. The value is its column in a table's row of float32; `field` is its name in `LayerRule` and JSON."""

    spec: Spec

    def __new__(cls, spec: Spec) -> "RuleNumber":
        column = len(cls.__members__)
        member = int.__new__(cls, column)
        member._value_ = column
        member.spec = spec
        return member

    TOP_K = Spec(int, lowest=1, of_experts=True)
    MASS = Spec(float, nullable=True)
    FLOOR = Spec(float, highest=1.0)
    RELATIVE_FLOOR = Spec(float, highest=1.0)
    RENORMALIZE = Spec(bool)
    BATCH_EXPERTS = Spec(int, lowest=1, nullable=True, of_experts=True)

    @property
    def field(self) -> str:
        return self.name.lower()

    @staticmethod
    def encode(value: float | None) -> float:
        """As kernels read it: null, which is no limit, is infinity."""
        return math.inf if value is None else float(value)
