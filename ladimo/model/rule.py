"""The numbers of a policy's rule. JSON, Python, the Triton kernels and the compiled CPU step all use this one definition.

To add a number, add a member here and a field to `LayerRule`, and write its effect in the three implementations of the rule:
`model/routing.py`, `model/kernels/routing.py` and `model/cpu/experts.h`.
"""

import math
from dataclasses import dataclass
from enum import IntEnum


@dataclass(frozen=True, slots=True)
class Spec:
    """The values that policy JSON may give to a number: of this kind, from `lowest` to `highest`.

    `nullable`: null is allowed, too, and means no limit. `of_experts`: the number counts experts, so it cannot be larger than
    the layer's number of experts.
    """

    kind: type[int | float]  # int, float or bool
    lowest: float = 0.0
    highest: float = math.inf
    nullable: bool = False
    of_experts: bool = False

    def __str__(self) -> str:
        """The rest of the error message "must be ..."."""
        if self.kind is bool:
            return "true or false"
        kind = "an integer" if self.kind is int else "a number"
        if self.highest < math.inf:
            return f"{kind} between {self.lowest:g} and {self.highest:g}"
        return f"{kind} of at least {self.lowest:g}"


class RuleNumber(IntEnum):
    """A number of a rule. Its value is its column in a table row of float32. `field` is its name in `LayerRule` and in JSON."""

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
    BITS = Spec(int, lowest=1, highest=16, nullable=True)
    ATTENTION_BITS = Spec(int, lowest=1, highest=16, nullable=True)
    REFINE = Spec(float, nullable=True)

    @property
    def field(self) -> str:
        """The name of the number in `LayerRule` and in policy JSON."""
        return self.name.lower()

    @staticmethod
    def encode(value: float | None) -> float:
        """The value as kernels read it. None, which means no limit, becomes infinity."""
        return math.inf if value is None else float(value)
