"""A named policy: one rule per layer. It is read, checked against a model, written, hashed and turned into numbers."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ladimo.model.config import ModelConfig
from ladimo.model.precision import KEY_VALUE_BITS, NESTED_BITS, WHOLE_BYTES, bytes_per_weight
from ladimo.model.rule import RuleNumber
from ladimo.policy.layer_rule import LayerRule, check_bits, check_refine, read_rule, whole_row
from ladimo.policy.values import canonical, checked_number, is_unicode

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


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
        if not isinstance(description, str) or not is_unicode(description):
            raise ValueError("description: must be a string of valid Unicode")
        layers = raw.get("layers")
        if not isinstance(layers, list):
            raise ValueError("layers: must be a list with one entry per layer")
        rules = tuple(read_rule(entry, f"layers[{index}]") for index, entry in enumerate(layers))
        head_bits, head_refine = (
            checked_number(raw.get(field), number.spec, field)
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
            written["head_refine"] = canonical(self.head_refine)
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
        check_bits(self.head_bits, config, "head_bits")
        check_refine(self.head_refine, self.head_bits, "head_refine")
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
            check_bits(rule.bits, config, f"{path}.bits")
            check_bits(rule.attention_bits, config, f"{path}.attention_bits")
            check_refine(rule.refine, rule.bits, f"{path}.refine")
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
                rows.append(whole_row())
                allowed.append([False] * num_experts)
            else:
                rows.append([number.encode(getattr(rule, number.field)) for number in RuleNumber])
                allowed.append([rule.experts is None or expert in rule.experts for expert in range(num_experts)])
        rows.append(whole_row(self.head_bits, self.head_refine))
        return rows, allowed

    @property
    def refines(self) -> bool:
        """Whether a token chooses what it reads at more bits."""
        return self.head_refine is not None or any(rule is not None and rule.refine is not None for rule in self.layers)

    def most_refined_rows(self, config: ModelConfig) -> int:
        """An upper limit of the rows of weights that a token refines."""
        neurons = config.intermediate_size * sum(rule is not None and rule.refine is not None for rule in self.layers)
        return config.neuron_rows * neurons + (config.vocab_size if self.head_refine is not None else 0)

    def bytes_ratio(self, config: ModelConfig, experts_per_token: Sequence[float | None], refined_rows: float) -> float | None:
        """`FrontierPoint.bytes_ratio` when layer i runs experts_per_token[i] experts, and so many rows of `hidden_size` weights
        are refined (`inputs.refined_rows`). None for a model of one precision."""
        if not config.nested_bits:
            return None
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
        return (read + refined_rows * _refined_row_bytes(config)) / _whole_bytes(config)

    def refined_rows(self, config: ModelConfig, experts_per_token: Sequence[float | None], bytes_ratio: float | None) -> float:
        """How many rows were refined where `bytes_ratio` is this."""
        unrefined = self.bytes_ratio(config, experts_per_token, 0.0)
        if unrefined is None or bytes_ratio is None:
            return 0.0
        return max(bytes_ratio - unrefined, 0.0) * _whole_bytes(config) / _refined_row_bytes(config)


def _whole_bytes(config: ModelConfig) -> float:
    """Of all weights that a token reads in the dense model at 16 bits."""
    layer = config.attention_parameters + config.ffn_parameters
    return WHOLE_BYTES * (config.num_hidden_layers * layer + config.head_parameters)


def _refined_row_bytes(config: ModelConfig) -> float:
    return config.hidden_size * bytes_per_weight(NESTED_BITS[0])


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
