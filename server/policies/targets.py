"""What an operator or a request can ask for: a policy by name, an accuracy, or automatic control."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

AUTO = "auto"
PREFILL, DECODE = "prefill", "decode"  # the ends of phases that are not a text: the end of the prompt, that of the answer


@dataclass(frozen=True, slots=True)
class Objective:
    """The targets of automatic control: 90th percentiles in milliseconds, between tokens and to the first token.

    None means no target. The accuracy never falls below `min_accuracy`, 0 to 1.
    """

    itl_ms: float | None = None
    ttft_ms: float | None = None
    min_accuracy: float = 0.0


@dataclass(frozen=True, slots=True)
class Named:
    """A policy by name."""

    policy: str

    def to_dict(self) -> dict[str, Any]:
        return {"policy": self.policy}


@dataclass(frozen=True, slots=True)
class AtAccuracy:
    """A point of the frontier by accuracy, 0 (cheapest) to 1 (most accurate)."""

    accuracy: float

    def to_dict(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy}


@dataclass(frozen=True, slots=True)
class Automatic:
    """Automatic control. A default has an objective. In a request it means: follow the server's default; `objective` is
    unused."""

    objective: Objective = Objective()

    def to_dict(self) -> dict[str, Any]:
        return {AUTO: {name: getattr(self.objective, name) for name in Objective.__dataclass_fields__}}


Target = Named | AtAccuracy | Automatic


@dataclass(frozen=True, slots=True)
class PhaseTarget:
    """What one phase of a request asks for. `until`: PREFILL or DECODE, or the text of the answer that ends the phase; None for
    the last phase. `min_accuracy`: as in `Ask`, for this phase."""

    target: Target
    until: str | None
    min_accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class InPhases:
    """Another policy or accuracy for each phase of a request."""

    phases: tuple[PhaseTarget, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request's choice. `source` is where it came from: "body", "header", "model", "tier" or "canary". `param` is the field
    or header.

    `min_accuracy`: automatic control may lower the accuracy this far. None: it may not lower it. Phases have their own.
    """

    target: Target | InPhases
    source: str
    param: str
    min_accuracy: float | None = None

    @property
    def follows_default(self) -> bool:
        """Whether it leaves the choice to the server, without a condition."""
        return isinstance(self.target, Automatic) and self.min_accuracy is None


def parse_default(raw: object) -> Target:
    """Read a default from JSON as operators write it. Raises ValueError, with the first wrong field at the message's start."""
    if not isinstance(raw, Mapping) or len(raw) != 1 or next(iter(raw)) not in ("policy", "accuracy", AUTO):
        raise ValueError('default: must be {"policy": NAME}, {"accuracy": X} or {"auto": {...}}')
    ((kind, value),) = raw.items()
    if kind == "policy":
        if not isinstance(value, str) or value == AUTO:
            raise ValueError("policy: must be the name of a policy")
        return Named(value)
    if kind == "accuracy":
        return AtAccuracy(_share(value, "accuracy"))
    return Automatic(_objective(value))


def _objective(raw: object) -> Objective:
    if not isinstance(raw, Mapping):
        raise ValueError("auto: must be an object")
    unknown = sorted(str(key) for key in set(raw) - set(Objective.__dataclass_fields__))
    if unknown:
        raise ValueError(f"auto.{unknown[0]}: unknown field")
    latencies = {}
    for name in ("itl_ms", "ttft_ms"):
        value = raw.get(name)
        if value is not None and not (is_number(value) and 0 < value <= 1e9):
            raise ValueError(f"auto.{name}: must be a positive number of milliseconds")
        latencies[name] = None if value is None else float(value)
    if set(latencies.values()) == {None}:
        raise ValueError("auto.itl_ms: automatic control needs itl_ms, ttft_ms or both")
    return Objective(**latencies, min_accuracy=_share(raw.get("min_accuracy", 0.0), "auto.min_accuracy"))


def _share(value: object, path: str) -> float:
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{path}: must be a number between 0 and 1")
    return float(value)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a finite number of a usable size."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**53 and math.isfinite(value)
