"""Reads the rotary embedding from config.json."""

import math
from collections.abc import Mapping
from typing import Any

from ladimo.model.config import ROPE_TYPES, RopeConfig
from ladimo.model.fields import positive_int, positive_number


def read_rope(raw: Mapping[str, Any], partial_rotary_factor: float | None = None) -> RopeConfig:
    """Read the rotary embedding from config.json.

    `partial_rotary_factor`: the family's default for this field. None: the family does not know the field, and rotates all
    channels. Raises ValueError for a type that we cannot compute.
    """
    # transformers 5 writes rope_parameters; older releases write rope_theta and rope_scaling side by side.
    for name in ("rope_parameters", "rope_scaling"):
        if raw.get(name) is not None and not isinstance(raw[name], Mapping):
            raise ValueError(f"{name} must be null or an object, got {raw[name]!r}")
    outside = {name: raw.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    parameters = {**outside, **(raw.get("rope_parameters") or raw.get("rope_scaling") or {})}
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ValueError(f"rope type is {rope_type!r}; supported: {', '.join(ROPE_TYPES)}")
    fields: dict[str, Any] = {"type": rope_type, "theta": positive_number(parameters, "rope_theta", RopeConfig().theta)}
    if partial_rotary_factor is not None:
        share = positive_number(parameters, "partial_rotary_factor", partial_rotary_factor)
        if share > 1:
            raise ValueError(f"partial_rotary_factor must be at most 1, got {share}")
        fields["partial_rotary_factor"] = share
    if rope_type in ("linear", "llama3"):
        if parameters.get("factor") is None:
            raise ValueError(f"rope type {rope_type!r} needs a factor")
        fields["factor"] = positive_number(parameters, "factor", 1.0)
    if rope_type == "llama3":
        fields |= _llama3_fields(parameters)
    if rope_type == "longrope":
        fields |= _longrope_fields(parameters, raw)
    return RopeConfig(**fields)


def _llama3_fields(parameters: Mapping[str, Any]) -> dict[str, Any]:
    default = RopeConfig()
    low = positive_number(parameters, "low_freq_factor", default.low_freq_factor)
    high = positive_number(parameters, "high_freq_factor", default.high_freq_factor)
    if low >= high:
        raise ValueError(f"low_freq_factor must be below high_freq_factor, got {low} and {high}")
    original = positive_int(parameters, "original_max_position_embeddings", default.original_max_position_embeddings)
    return {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}


def _longrope_fields(parameters: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {name: _positive_numbers(parameters, name) for name in ("short_factor", "long_factor")}
    # As in transformers, the field outside of the rope parameters comes first. Phi-3 has it there.
    place = raw if raw.get("original_max_position_embeddings") is not None else parameters
    original = positive_int(place, "original_max_position_embeddings")
    if original < 2:
        raise ValueError(f"original_max_position_embeddings must be at least 2, got {original}")
    factor = positive_number(parameters, "factor", positive_int(raw, "max_position_embeddings") / original)
    recommended = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    fields["attention_factor"] = positive_number(parameters, "attention_factor", recommended)
    fields["original_max_position_embeddings"] = original
    return fields


def _positive_numbers(parameters: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = parameters.get(name)
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list of numbers, got {values!r}")
    named = {f"{name}[{index}]": value for index, value in enumerate(values)}
    return tuple(positive_number(named, one, math.nan) for one in named)
