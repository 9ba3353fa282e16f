"""Routing policies and the accuracy/cost frontier, as plain values: how they are read, checked, written and hashed.

A policy has a `LayerRule` for each expert layer and None for each dense layer. `to_rows` turns a policy into the numbers that
kernels read. So kernels never need to know which policy they run.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from typing import Any

from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.precision import KEY_VALUE_BITS, NESTED_BITS, WHOLE_BYTES, bytes_per_weight
from ladimo.model.rule import RuleNumber, Spec

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
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
    neuron. Needs bits 4. See `ladimo.model.refinement`.
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
                value = _canonical(value)
            written[name] = value
        return written


RULE_FIELDS = {field.name: field for field in fields(LayerRule)}


@dataclass(frozen=True)
class RoutingPolicy:
    """A named policy: one rule per layer, None for a dense layer. `head_bits`: how many bits are read of the output head's
    weights, None for all. `head_refine`: words whose logit at 4 bits is at most this far below the best one are read at 8
    bits; None for no word. Equal content has an equal `version` on every machine."""

    name: str
    description: str
    layers: tuple[LayerRule | None, ...]
    head_bits: int | None = None
    head_refine: float | None = None

    @classmethod
    def from_dict(cls, raw: object) -> "RoutingPolicy":
        """Read policy JSON. Raises ValueError, with the JSON path of the first wrong field at the beginning of its message."""
        if not isinstance(raw, Mapping):
            raise ValueError("policy: must be a JSON object")
        unknown = sorted(str(key) for key in set(raw) - {"name", "description", "layers", "head_bits", "head_refine"})
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown field")
        name = raw.get("name")
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
            raise ValueError("name: must be 1 to 64 letters, digits, '.', '_' or '-', and begin with a letter or digit")
        description = raw.get("description", "")
        if not isinstance(description, str) or not _is_unicode(description):
            raise ValueError("description: must be a string of valid Unicode")
        layers = raw.get("layers")
        if not isinstance(layers, list):
            raise ValueError("layers: must be a list with one entry per layer")
        rules = tuple(_rule(entry, f"layers[{index}]") for index, entry in enumerate(layers))
        head_bits, head_refine = (
            _checked(raw.get(field), number.spec, field)
            for field, number in (("head_bits", RuleNumber.BITS), ("head_refine", RuleNumber.REFINE))
        )
        return cls(name, description, rules, head_bits, head_refine)

    def to_dict(self) -> dict[str, Any]:
        """The policy as JSON. `from_dict` reads it back."""
        layers = [None if rule is None else rule.to_dict() for rule in self.layers]
        written: dict[str, Any] = {"name": self.name, "description": self.description, "layers": layers}
        if self.head_bits is not None:
            written["head_bits"] = self.head_bits
        if self.head_refine is not None:
            written["head_refine"] = _canonical(self.head_refine)
        return written

    @cached_property
    def version(self) -> str:
        """The first 12 hex digits of the SHA-256 of the canonical JSON (sorted keys, no spaces, UTF-8)."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @cached_property
    def has_batch_budget(self) -> bool:
        """Whether some layer has `batch_experts`. The results of a decoding token then depend on the other tokens of its
        step."""
        return any(rule is not None and rule.batch_experts is not None for rule in self.layers)

    def validate(self, config: ModelConfig) -> None:
        """Check the policy against a model. Raises ValueError naming the first field that does not fit."""
        if len(self.layers) != config.num_hidden_layers:
            raise ValueError(f"layers: has {len(self.layers)} entries, the model has {config.num_hidden_layers} layers")
        _check_bits(self.head_bits, config, "head_bits")
        _check_refine(self.head_refine, self.head_bits, "head_refine")
        for index, (rule, layer) in enumerate(zip(self.layers, config.layers, strict=True)):
            path = f"layers[{index}]"
            if layer is None or rule is None:
                if rule is not None:
                    raise ValueError(f"{path}: must be null, the layer is dense")
                if layer is not None:
                    raise ValueError(f"{path}: must be a rule, the layer has {layer.num_experts} experts")
                continue
            for number in RuleNumber:
                value = getattr(rule, number.field)
                if number.spec.of_experts and value is not None and value > layer.num_experts:
                    raise ValueError(f"{path}.{number.field}: is {value}, the layer has {layer.num_experts} experts")
            _check_bits(rule.bits, config, f"{path}.bits")
            _check_bits(rule.attention_bits, config, f"{path}.attention_bits")
            _check_refine(rule.refine, rule.bits, f"{path}.refine")
            if rule.refine is not None and config.nested_top_bits is not None:
                raise ValueError(
                    f"{path}.refine: neurons cannot be refined, because this checkpoint's top is {config.nested_top_bits} "
                    "bits; the server does not keep them one by one"
                )
            if rule.experts is not None and max(rule.experts) >= layer.num_experts:
                raise ValueError(f"{path}.experts: {max(rule.experts)} is not below {layer.num_experts}")

    def to_rows(self, num_experts: int) -> tuple[list[list[float]], list[list[bool]]]:
        """The numbers of the rules, [L + 1][len(RuleNumber)], and the masks of experts that may be chosen, [L][num_experts].

        A dense layer chooses no expert and is read whole. The last row is the output head's, of which only BITS and REFINE
        count.
        `num_experts` is the width of the table.
        """
        rows, allowed = [], []
        for rule in self.layers:
            if rule is None:
                rows.append(_whole_row())
                allowed.append([False] * num_experts)
            else:
                rows.append([number.encode(getattr(rule, number.field)) for number in RuleNumber])
                allowed.append([rule.experts is None or expert in rule.experts for expert in range(num_experts)])
        rows.append(_whole_row(self.head_bits, self.head_refine))
        return rows, allowed

    @property
    def refines(self) -> bool:
        """Whether a token chooses what it reads at more bits."""
        return self.head_refine is not None or any(rule is not None and rule.refine is not None for rule in self.layers)

    def most_refined_rows(self, config: ModelConfig) -> int:
        """An upper limit of the rows of weights that a token refines."""
        neurons = config.intermediate_size * sum(rule is not None and rule.refine is not None for rule in self.layers)
        return 3 * neurons + (config.vocab_size if self.head_refine is not None else 0)

    def bytes_ratio(self, config: ModelConfig, experts_per_token: Sequence[float | None], refined_rows: float) -> float | None:
        """`FrontierPoint.bytes_ratio` when layer i runs experts_per_token[i] experts, and so many rows of `hidden_size` weights
        are refined (`StepOutput.refined_rows`). None for a model of one precision."""
        if not config.nested_bits:
            return None
        layer_parameters = config.attention_parameters + config.ffn_parameters
        whole = WHOLE_BYTES * (config.num_hidden_layers * layer_parameters + config.head_parameters)
        read = bytes_per_weight(config.bits_read(self.head_bits)) * config.head_parameters
        for rule, layer, experts in zip(self.layers, config.layers, experts_per_token, strict=True):
            asked = (None, None) if rule is None else (rule.attention_bits, rule.bits)
            attention_bits, bits = map(config.bits_read, asked)
            ffn = (
                config.ffn_parameters
                if layer is None or experts is None
                else layer.active_parameters(config.hidden_size, experts)
            )
            careful = None if attention_bits is None else max(attention_bits, KEY_VALUE_BITS)
            queries = config.attention_parameters - config.key_value_parameters
            read += bytes_per_weight(attention_bits) * queries + bytes_per_weight(careful) * config.key_value_parameters
            read += bytes_per_weight(bits) * ffn
        # A refined row is read from the low plane, and its scales are read once more.
        return (read + refined_rows * config.hidden_size * bytes_per_weight(NESTED_BITS[0])) / whole


def unmeasured_policies(config: ModelConfig) -> dict[str, RoutingPolicy]:
    """The policies of a model without files for them, by name. A dense model has only "full".

    A model that was trained as MoE also has "top-N" for every N below its own number of experts per token. Nothing is known of
    their accuracy until `ladimo profile` measures it.
    """
    full = tuple(None if layer is None else LayerRule.full(layer) for layer in config.layers)
    if not config.moe_layer_indices:
        return {"full": RoutingPolicy("full", "the dense model", full)}
    policies = {"full": RoutingPolicy("full", "as many experts per token as the model was trained with", full)}
    for count in reversed(range(1, max(rule.top_k for rule in full if rule is not None))):
        rules = tuple(None if rule is None else replace(rule, top_k=min(rule.top_k, count)) for rule in full)
        policies[f"top-{count}"] = RoutingPolicy(f"top-{count}", f"{count} expert{'s' * (count > 1)} per token", rules)
    return policies


@dataclass(frozen=True)
class FrontierPoint:
    """A measured point of the frontier: a policy, its cost and its accuracy.

    batch: the batch size for whose cost the point was chosen. active_parameters_ratio: active parameters per token divided by
    those of the dense model. perplexity_ratio: perplexity divided by that of the dense model on the same text.
    experts_per_token: the measured mean per layer, None for a dense layer. bytes_ratio: weight bytes that a decode step of one
    token reads, divided by those of the dense model at 16 bits, output head included; None where all policies read all bits.
    """

    batch: int
    policy: str
    active_parameters_ratio: float
    perplexity: float
    perplexity_ratio: float
    experts_per_token: tuple[float | None, ...]
    bytes_ratio: float | None = None

    @property
    def cost(self) -> float:
        """The cost by which an accuracy chooses: weight bytes if the policies differ in bits, otherwise active parameters."""
        return self.active_parameters_ratio if self.bytes_ratio is None else self.bytes_ratio

    def to_dict(self) -> dict[str, Any]:
        """The point as JSON."""
        written = {name: getattr(self, name) for name in self.__dataclass_fields__}
        written["experts_per_token"] = list(self.experts_per_token)
        if self.bytes_ratio is None:
            del written["bytes_ratio"]
        return written


@dataclass(frozen=True)
class Frontier:
    """Measured points, cheapest first. Perplexity falls as the cost rises. A request's `accuracy` chooses among the points."""

    points: tuple[FrontierPoint, ...]

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

    def for_batch(self, batch: int) -> "Frontier":
        """The points that were chosen for this batch size. Raises ValueError if there are none."""
        points = tuple(point for point in self.points if point.batch == batch)
        if not points:
            known = sorted({point.batch for point in self.points})
            raise ValueError(f"the frontier has no points for batch {batch}; it has {known}")
        return Frontier(points)

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
    raw = {"bytes_ratio": None, **raw}
    wrong = sorted(str(key) for key in set(raw) ^ set(FrontierPoint.__dataclass_fields__))
    if wrong:
        raise ValueError(f"{path}.{wrong[0]}: missing or unknown field")
    if isinstance(raw["batch"], bool) or not isinstance(raw["batch"], int) or raw["batch"] < 1:
        raise ValueError(f"{path}.batch: must be an integer of at least 1")
    if not isinstance(raw["policy"], str):
        raise ValueError(f"{path}.policy: must be a string")
    for name in ("active_parameters_ratio", "perplexity", "perplexity_ratio"):
        if not (_is_number(raw[name]) and raw[name] > 0):
            raise ValueError(f"{path}.{name}: must be a number above 0")
    if raw["bytes_ratio"] is not None and not (_is_number(raw["bytes_ratio"]) and raw["bytes_ratio"] > 0):
        raise ValueError(f"{path}.bytes_ratio: must be null or a number above 0")
    experts = raw["experts_per_token"]
    if not isinstance(experts, list) or not all(x is None or (_is_number(x) and x >= 0) for x in experts):
        raise ValueError(f"{path}.experts_per_token: must be a list of null or numbers of at least 0")
    return FrontierPoint(**{**raw, "experts_per_token": tuple(experts)})


def _rule(raw: object, path: str) -> LayerRule | None:
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path}: must be null or an object")
    unknown = sorted(str(key) for key in set(raw) - RULE_FIELDS.keys())
    if unknown:
        raise ValueError(f"{path}.{unknown[0]}: unknown field")
    numbers = {
        name: _checked(raw.get(name, field.default), number.spec, f"{path}.{name}")
        for number in RuleNumber
        for name, field in [(number.field, RULE_FIELDS[number.field])]
    }
    return LayerRule(experts=_experts(raw.get("experts"), f"{path}.experts"), **numbers)


def _checked(value: Any, spec: Spec, path: str) -> Any:
    """A number of policy JSON. `path` names it in errors."""
    if value is None and spec.nullable:
        return None
    if value is MISSING or not _fits(value, spec):
        raise ValueError(f"{path}: must be {'null or ' * spec.nullable}{spec}")
    return spec.kind(value)


def _check_bits(bits: int | None, config: ModelConfig, path: str) -> None:
    if bits is not None and bits not in config.nested_bits:
        known = "".join(f"{known}, " for known in config.nested_bits)
        raise ValueError(f"{path}: is {bits}; this checkpoint's weights can be read at {known}null (all bits)")


def _check_refine(refine: float | None, bits: int | None, path: str) -> None:
    if refine is not None and bits != NESTED_BITS[0]:
        raise ValueError(f"{path}: needs {NESTED_BITS[0]} bits, which are refined to {NESTED_BITS[1]}; bits is {bits}")


def _whole_row(bits: int | None = None, refine: float | None = None) -> list[float]:
    """A row that chooses no expert and reads so many bits of everything."""
    row = [0.0] * len(RuleNumber)
    row[RuleNumber.BITS] = row[RuleNumber.ATTENTION_BITS] = RuleNumber.encode(bits)
    row[RuleNumber.REFINE] = RuleNumber.encode(refine)
    return row


def _fits(value: Any, spec: Spec) -> bool:
    right_kind = _is_number(value) if spec.kind is float else type(value) is spec.kind
    return right_kind and spec.lowest <= value <= spec.highest


def _experts(raw: object, path: str) -> tuple[int, ...] | None:
    if raw is None:
        return None
    numbers = raw if isinstance(raw, list) else []
    valid = all(isinstance(expert, int) and not isinstance(expert, bool) and expert >= 0 for expert in numbers)
    if not numbers or not valid or len(set(numbers)) != len(numbers):
        raise ValueError(f"{path}: must be null or a non-empty list of different expert numbers")
    return tuple(sorted(numbers))


def _canonical(value: float) -> float:
    """Write equal numbers in the same way: 1 becomes 1.0 and -0.0 becomes 0.0. So equal rules have equal versions."""
    return float(value) + 0.0


def _is_unicode(text: str) -> bool:
    """Whether the text can be written in UTF-8. JSON can contain half of a surrogate pair, but UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # also false for NaN, infinity and integers that are too large for a float
