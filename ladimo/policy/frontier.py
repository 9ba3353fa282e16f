"""The frontier: measured policies by cost. A request's `accuracy` chooses a point."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ladimo.model.config import ModelConfig
from ladimo.policy.values import is_number

OPTIONAL = ("bytes_ratio", "prefill_time_ratio")  # fields of a point; not written if they are None
PREFILL = "prefill"  # in the place of a batch size: the points that were chosen for prompts


@dataclass(frozen=True)
class FrontierPoint:
    """A measured point of the frontier: a policy, its cost and its accuracy.

    batch: the batch size for whose cost the point was chosen, or PREFILL. active_parameters_ratio: active parameters per token
    divided by those of the dense model. perplexity_ratio: perplexity divided by that of the dense model on the same text.
    experts_per_token: the measured mean per layer, None for a dense layer. bytes_ratio: weight bytes that a decode step of one
    token reads, divided by those of the dense model at 16 bits, output head included; None where all policies read all bits.
    prefill_time_ratio: the time of a prompt, divided by that of the dense model, where points were chosen for that.
    """

    batch: int | str
    policy: str
    active_parameters_ratio: float
    perplexity: float
    perplexity_ratio: float
    experts_per_token: tuple[float | None, ...]
    bytes_ratio: float | None = None
    prefill_time_ratio: float | None = None

    @property
    def cost(self) -> float:
        """The cost by which an accuracy chooses: the time of prompts if the point was chosen by it. Otherwise weight bytes if
        the policies differ in bits, and else active parameters."""
        if self.prefill_time_ratio is not None:
            return self.prefill_time_ratio
        return self.active_parameters_ratio if self.bytes_ratio is None else self.bytes_ratio

    def token_costs(self, config: ModelConfig) -> dict[str, float]:
        """See `token_costs`."""
        return token_costs(config, self.experts_per_token, self.bytes_ratio)

    def to_dict(self) -> dict[str, Any]:
        """The point as JSON."""
        written = {name: getattr(self, name) for name in self.__dataclass_fields__}
        written["experts_per_token"] = list(self.experts_per_token)
        for name in OPTIONAL:
            if written[name] is None:
                del written[name]
        return written


@dataclass(frozen=True)
class Frontier:
    """Measured points, cheapest first. Perplexity falls as the cost rises. A request's `accuracy` chooses among the points.

    beaten: measured points that others beat. They are not stored.
    """

    points: tuple[FrontierPoint, ...]
    beaten: tuple[FrontierPoint, ...] = ()

    @classmethod
    def from_dict(cls, raw: object) -> "Frontier":
        """Read frontier JSON. Raises ValueError, with the JSON path of the first wrong field at the beginning of its
        message."""
        points = raw.get("points") if isinstance(raw, Mapping) else None
        if not isinstance(points, list):
            raise ValueError("points: must be a list")
        return cls(tuple(_point(point, f"points[{index}]") for index, point in enumerate(points)))

    def to_dict(self) -> dict[str, Any]:
        """The frontier as JSON. `from_dict` reads it back."""
        return {"points": [point.to_dict() for point in self.points]}

    def for_batch(self, batch: int | str) -> "Frontier":
        """The points that were chosen for this batch size. Raises ValueError if there are none."""
        points = tuple(point for point in self.points if point.batch == batch)
        if not points:
            known = sorted({point.batch for point in self.points}, key=str)
            raise ValueError(f"the frontier has no points for batch {batch}; it has {known}")
        return Frontier(points)

    def find(self, policy: str) -> FrontierPoint | None:
        """The measured point of this policy, even if others beat it; None if there is none."""
        return next((point for point in (*self.points, *self.beaten) if point.policy == policy), None)

    @property
    def is_prefill(self) -> bool:
        """Whether the points were chosen by the time of prompts."""
        return any(point.batch == PREFILL for point in self.points)

    @property
    def lowest(self) -> float:
        """The smallest cost of a point."""
        return min(point.cost for point in self.points)

    @property
    def highest(self) -> float:
        """The largest cost of a point."""
        return max(point.cost for point in self.points)

    def choose(self, accuracy: float) -> FrontierPoint:
        """The most accurate point whose cost is at most lowest + accuracy * (highest - lowest).

        Raises ValueError unless accuracy is in [0, 1].
        """
        if not 0.0 <= accuracy <= 1.0:  # also refuses NaN
            raise ValueError(f"accuracy must be between 0 and 1, got {accuracy}")
        # The tolerance makes sure that the accuracy that `position` reports for a point chooses this point.
        limit = self.lowest + accuracy * (self.highest - self.lowest) + 1e-9
        affordable = [point for point in self.points if point.cost <= limit]
        return min(affordable, key=lambda point: (point.perplexity, point.cost))

    def position(self, policy: str) -> float | None:
        """An accuracy at which `choose` returns this policy; None if the policy is not on the frontier."""
        span = self.highest - self.lowest
        for point in self.points:
            if point.policy == policy:
                return 1.0 if span == 0 else (point.cost - self.lowest) / span
        return None


def token_costs(
    config: ModelConfig, experts_per_token: tuple[float | None, ...], bytes_ratio: float | None
) -> dict[str, float]:
    """What a token costs under a policy, divided by what it costs in the dense model, output head included.

    decode_bytes_ratio: the weight bytes that a decode step of one token reads. It is `bytes_ratio`; where that is None, every
    weight is read at the same number of bits. prefill_operations_ratio: multiply-adds with weights, per token of a prompt.
    """
    operations = config.operations_ratio(experts_per_token)
    return {
        "decode_bytes_ratio": operations if bytes_ratio is None else bytes_ratio,
        "prefill_operations_ratio": operations,
    }


def pareto(points: Iterable[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    """The points that no other point beats at the same or a lower cost. Cheapest first; cost and accuracy strictly rise."""
    kept: list[FrontierPoint] = []
    for point in sorted(points, key=lambda point: (point.cost, point.perplexity)):
        if not kept or point.perplexity < kept[-1].perplexity:
            kept.append(point)
    return tuple(kept)


def _point(raw: object, path: str) -> FrontierPoint:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path}: must be an object")
    raw = dict.fromkeys(OPTIONAL) | dict(raw)
    wrong = sorted(str(key) for key in set(raw) ^ set(FrontierPoint.__dataclass_fields__))
    if wrong:
        raise ValueError(f"{path}.{wrong[0]}: missing or unknown field")
    batch = raw["batch"]
    if batch != PREFILL and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ValueError(f"{path}.batch: must be an integer of at least 1, or {PREFILL!r}")
    if not isinstance(raw["policy"], str):
        raise ValueError(f"{path}.policy: must be a string")
    for name in ("active_parameters_ratio", "perplexity", "perplexity_ratio"):
        if not (is_number(raw[name]) and raw[name] > 0):
            raise ValueError(f"{path}.{name}: must be a number above 0")
    for name in OPTIONAL:
        if raw[name] is not None and not (is_number(raw[name]) and raw[name] > 0):
            raise ValueError(f"{path}.{name}: must be null or a number above 0")
    experts = raw["experts_per_token"]
    if not isinstance(experts, list) or not all(x is None or (is_number(x) and x >= 0) for x in experts):
        raise ValueError(f"{path}.experts_per_token: must be a list of null or numbers of at least 0")
    return FrontierPoint(**{**raw, "experts_per_token": tuple(experts)})
