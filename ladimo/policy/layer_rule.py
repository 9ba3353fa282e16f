"""The rule of one layer: the numbers that choose the experts of a token and the bits that are read of them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.precision import NESTED_BITS
from ladimo.model.rule import RuleNumber
from ladimo.policy.values import canonical, checked_number

# Fields that are always in policy JSON. Other fields are written only if they differ from their default. So a new field does
# not change the version of policies that do not use it.
ALWAYS_WRITTEN = ("top_k", "mass", "floor", "renormalize", "experts")


@dataclass(frozen=True, slots=True)
class LayerRule:
    """The rule that chooses the experts of a token in one layer. The best expert (rank 0) is always kept.

    top_k: keep at most this many experts.
    mass: stop when the scores of the kept experts sum to this. None = no limit.
    floor: drop experts with a lower score than this.
    renormalize: divide the kept weights by their sum.
    experts: the experts that may be chosen. None = all.
    batch_experts: at most this many different experts for all decoding tokens of a step together, besides those that the step
    reads anyway. None = no limit. See `routing.apply_batch_budget`.
    relative_floor: drop experts whose score is lower than this share of the best score. 0 = drop none.
    bits, attention_bits: how many bits are read of the experts' weights, and of the attention's. None = all. See
    `ladimo.model.nested`.
    refine: a neuron whose score at 4 bits is at least this many times the token's mean score is read at 8 bits. None = no
    neuron. Needs bits 4. See `ladimo.model.nested.refinement`.
    """

    top_k: int
    mass: float | None = None
    floor: float = 0.0
    renormalize: bool = True
    experts: tuple[int, ...] | None = None
    batch_experts: int | None = None
    relative_floor: float = 0.0
    bits: int | None = None
    attention_bits: int | None = None
    refine: float | None = None

    @classmethod
    def full(cls, layer: MoeLayerConfig) -> "LayerRule":
        """The rule of the layer in policy `full`: as many experts as it was distilled for, and no substitutes.

        Weights are renormalised to a sum of 1, unless every expert counts with 1 anyway, or the model was trained without.
        """
        experts = tuple(range(layer.num_experts - layer.substitutes)) if layer.substitutes else None
        scored = layer.expert_weight == "score" and not layer.fixed_experts
        return cls(layer.num_experts_per_tok, renormalize=scored and layer.norm_topk_prob, experts=experts)

    @property
    def limits(self) -> dict[str, float]:
        """The numbers, by field, that are set and may drop one of the `top_k` experts, by its score or by the batch budget."""
        fixed = (RuleNumber.TOP_K, RuleNumber.RENORMALIZE, RuleNumber.BITS, RuleNumber.ATTENTION_BITS, RuleNumber.REFINE)
        values = {number.field: getattr(self, number.field) for number in RuleNumber if number not in fixed}
        return {name: value for name, value in values.items() if value != RULE_FIELDS[name].default}

    def to_dict(self) -> dict[str, Any]:
        """The rule as policy JSON."""
        written: dict[str, Any] = {}
        for name, field in RULE_FIELDS.items():
            value = getattr(self, name)
            if name not in ALWAYS_WRITTEN and value == field.default:
                continue
            if isinstance(value, tuple):
                value = list(value)
            elif value is not None and RuleNumber[name.upper()].spec.kind is float:
                value = canonical(value)
            written[name] = value
        return written


RULE_FIELDS = {field.name: field for field in fields(LayerRule)}


def read_rule(raw: object, path: str) -> LayerRule | None:
    """Read the rule of one layer from policy JSON. Raises ValueError beginning with `path` and the field."""
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path}: must be null or an object")
    unknown = sorted(str(key) for key in set(raw) - RULE_FIELDS.keys())
    if unknown:
        raise ValueError(f"{path}.{unknown[0]}: unknown field")
    numbers = {
        name: checked_number(raw.get(name, field.default), number.spec, f"{path}.{name}")
        for number in RuleNumber
        for name, field in [(number.field, RULE_FIELDS[number.field])]
    }
    return LayerRule(experts=_experts(raw.get("experts"), f"{path}.experts"), **numbers)


def _experts(raw: object, path: str) -> tuple[int, ...] | None:
    if raw is None:
        return None
    numbers = raw if isinstance(raw, list) else []
    valid = all(isinstance(expert, int) and not isinstance(expert, bool) and expert >= 0 for expert in numbers)
    if not numbers or not valid or len(set(numbers)) != len(numbers):
        raise ValueError(f"{path}: must be null or a non-empty list of different expert numbers")
    return tuple(sorted(numbers))


def check_bits(bits: int | None, config: ModelConfig, path: str) -> None:
    """Raises ValueError if the model's weights cannot be read at so many bits."""
    if bits is not None and bits not in config.nested_bits:
        known = "".join(f"{known}, " for known in config.nested_bits)
        raise ValueError(f"{path}: is {bits}; this checkpoint's weights can be read at {known}null (all bits)")


def check_refine(refine: float | None, bits: int | None, path: str) -> None:
    """Raises ValueError if rows are refined that are not read at the lowest precision."""
    if refine is not None and bits != NESTED_BITS[0]:
        raise ValueError(f"{path}: needs {NESTED_BITS[0]} bits, which are refined to {NESTED_BITS[1]}; bits is {bits}")


def whole_row(bits: int | None = None, refine: float | None = None) -> list[float]:
    """A row that chooses no expert and reads so many bits of everything."""
    row = [0.0] * len(RuleNumber)
    row[RuleNumber.BITS] = row[RuleNumber.ATTENTION_BITS] = RuleNumber.encode(bits)
    row[RuleNumber.REFINE] = RuleNumber.encode(refine)
    return row
