"""Converted checkpoints. Their config.json states every value, and names the family of the dense model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from ladimo.model.config import MOE_TYPE, ModelConfig, MoeLayerConfig, QkNorm
from ladimo.model.families.family import Family
from ladimo.model.precision import NESTED_BITS


class Converted(Family):
    """The model type of converted checkpoints."""

    def read_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        # Checkpoints converted before the field existed were all LLaMA inside.
        family = raw.get("family", "llama")
        if not isinstance(family, str):
            raise ValueError(f"family must be a string, got {family!r}")
        nested_bits = raw.get("nested_bits") or []
        if nested_bits not in ([], list(NESTED_BITS)):
            raise ValueError(f"nested_bits must be null, [] or {list(NESTED_BITS)}, got {nested_bits!r}")
        qk_norm = raw.get("qk_norm", "none")
        if qk_norm not in get_args(QkNorm):
            raise ValueError(f"qk_norm must be one of {', '.join(get_args(QkNorm))}, got {qk_norm!r}")
        return replace(super().read_config(raw), family=family, nested_bits=tuple(nested_bits), qk_norm=qk_norm)

    def read_layers(self, raw: Mapping[str, Any], num_layers: int) -> tuple[MoeLayerConfig | None, ...]:
        entries = raw.get("moe_layers")
        if not isinstance(entries, list) or len(entries) != num_layers:
            raise ValueError(f"moe_layers must be a list with one entry for each of the {num_layers} layers")
        layers = []
        for index, entry in enumerate(entries):
            try:
                layers.append(None if entry is None else MoeLayerConfig(**entry))
            except (TypeError, ValueError) as error:
                raise ValueError(f"moe_layers[{index}]: {error}") from error
        return tuple(layers)


CONVERTED = Converted(MOE_TYPE, use_sliding_window=False, partial_rotary_factor=1.0)
