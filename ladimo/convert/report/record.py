"""report.json as typed values: the fields of every conversion, and those that some conversions add. Errors name the field.

`Report.raw` has all fields, also those of the method, which the method reads itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ladimo.convert.typed import build
from ladimo.prefill import FormCosts


@dataclass(frozen=True, slots=True)
class Source:
    name: str
    sha256: str
    perplexity: float


@dataclass(frozen=True, slots=True)
class MethodUsed:
    name: str
    description: str


@dataclass(frozen=True, slots=True)
class TextFile:
    path: str


@dataclass(frozen=True, slots=True)
class Profiled:
    """The text of a later profile, on which policies were measured again."""

    text: TextFile
    tokens: dict[str, int]


@dataclass(frozen=True, slots=True)
class Conditions:
    text: str | list[TextFile]
    tokens: dict[str, int]
    note: str
    protocol: str
    device: str
    dtype: str
    training_seconds: float
    profiled: Profiled | None = None
    prefill_costs: FormCosts | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """bits, refine: of the FFN, if the model is nested. No bits: all."""

    mass: float | None = None
    bits: int | None = None
    refine: float | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    policy: str
    perplexity: float
    perplexity_ratio: float
    active_parameters_ratio: float
    experts_per_token: list[float | None]
    next_token_agreement: float | None
    kl: float | None
    description: str
    rules: list[Rule | None]
    rule_names: list[str]
    bytes_ratio: float | None = None
    prefill_operations_ratio: float | None = None
    batch_bytes_ratio: float | None = None
    prefill_time_ratio: float | None = None

    @property
    def cost(self) -> float:
        """The same as `FrontierPoint.cost`."""
        return self.active_parameters_ratio if self.bytes_ratio is None else self.bytes_ratio

    @property
    def cost_name(self) -> str:
        """The unit that the cost counts."""
        return "active parameters" if self.bytes_ratio is None else "weight bytes"


@dataclass(frozen=True, slots=True)
class Point:
    batch: int
    policy: str


@dataclass(frozen=True, slots=True)
class FrontierPoints:
    points: list[Point]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """holdout: error on held-out tokens, divided by the variance of the FFN's outputs."""

    step: int
    holdout: float


@dataclass(frozen=True, slots=True)
class Profile:
    """The profile of a layer's router; see `ladimo.convert.policies.routing_profile`."""

    histogram: list[int]
    mean_best_weight: float
    load: list[float]
    kept_error: float
    one_error: float


@dataclass(frozen=True, slots=True)
class Layer:
    """A candidate layer. All fields except the first two depend on the method."""

    layer: int
    converted: bool
    seconds: float | None = None
    converted_alone_perplexity: float | None = None
    initial_error: float | None = None
    error: float | None = None
    curve: list[CurvePoint] = field(default_factory=list)
    profile: Profile | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One method at one budget. target: the share of the dense model's parameters that was asked for.
    active_parameters_ratio: the share that was reached. perplexity_ratio: relative to dense, the median over `seeds` seeds.
    spread: half the distance between the best and the worst seed."""

    method: str
    tokens: int
    target: float
    active_parameters_ratio: float
    perplexity_ratio: float
    spread: float
    seeds: int


@dataclass(frozen=True, slots=True)
class Speed:
    policy: str
    batch: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Throughput:
    conditions: dict[str, Any]
    results: list[Speed]


@dataclass(frozen=True, slots=True)
class Score:
    accuracy: float
    stderr: float | None = None
    policy: str = "dense"


@dataclass(frozen=True, slots=True)
class TaskScores:
    task: str
    items: int
    dense: Score | None
    policies: list[Score]


@dataclass(frozen=True, slots=True)
class DepthPoint:
    """The model with the `converted` least damaging layers converted."""

    converted: int
    layers: list[int]
    perplexity_ratio: float
    next_token_agreement: float
    active_parameters_ratio: float


@dataclass(frozen=True, slots=True)
class Initialisation:
    layer: int
    steps: int
    curves: dict[str, list[CurvePoint]]


@dataclass(frozen=True, slots=True)
class Report:
    model: str
    source: Source
    method: MethodUsed
    recipe: dict[str, Any]
    conditions: Conditions
    num_hidden_layers: int
    layers: list[Layer]
    policies: list[Policy]
    frontier: FrontierPoints
    holdout_dense_perplexity: float | None = None
    comparison: list[Comparison] = field(default_factory=list)
    throughput: Throughput | None = None
    tasks: list[TaskScores] = field(default_factory=list)
    depth: list[DepthPoint] = field(default_factory=list)
    initialisation: Initialisation | None = None
    raw: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Report":
        """Raises ValueError with the name of the first field that is missing, wrong, or contradicts other fields."""
        report = replace(build(cls, raw, closed=False), raw=dict(raw))
        names = [policy.policy for policy in report.policies]
        if not names:
            raise ValueError("policies: is empty")
        for number, policy in enumerate(report.policies):
            for key in ("experts_per_token", "rules", "rule_names"):
                if len(getattr(policy, key)) != report.num_hidden_layers:
                    raise ValueError(f"policies[{number}].{key}: must have one entry per layer, {report.num_hidden_layers}")
        for number, point in enumerate(report.frontier.points):
            if point.policy not in names:
                raise ValueError(f"frontier.points[{number}].policy: {point.policy!r} is none of the policies")
        return report
