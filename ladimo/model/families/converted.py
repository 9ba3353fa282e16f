"""Converted checkpoints. Their config.json states every value, and names the family of the dense model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from ladimo.model.config import MOE_TYPE, FfnKind, ModelConfig, MoeLayerConfig, NormKind, QkNorm
from ladimo.model.families.family import Family
from ladimo.model.fields import flag
from ladimo.model.precision import NESTED_BITS

KINDS = {"qk_norm": get_args(QkNorm), "norm_kind": get_args(NormKind), "ffn_kind": get_args(FfnKind)}


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
        top = raw.get("nested_top_bits")
        if top is not None and (top != max(NESTED_BITS) or isinstance(top, float) or not nested_bits):
            raise ValueError(f"nested_top_bits must be null, or {max(NESTED_BITS)} beside nested_bits, got {top!r}")
        stated: dict[str, Any] = {name: flag(raw, name) for name in ("parallel_block", "head_bias")}
        for name, kinds in KINDS.items():
            stated[name] = raw.get(name, getattr(self, name))
            if stated[name] not in kinds:
                raise ValueError(f"{name} must be one of {', '.join(kinds)}, got {stated[name]!r}")
        config = super(Converted, replace(self, **stated)).read_config(raw)
        if top is not None and None in config.layers:
            raise ValueError(f"nested_top_bits: is {top}, but layer {config.layers.index(None)} is dense, and read whole")
        return replace(
            config, family=family, nested_bits=tuple(nested_bits), nested_top_bits=top, qk_pairs=read_qk_pairs(raw, config)
        )

    def read_layers(self, raw: Mapping[str, Any], num_layers: int) -> tuple[MoeLayerConfig | None, ...]:
        entries = raw.get("moe_layers")
        if not isinstance(entries, list) or len(entries) != num_layers:
            raise ValueError(f"moe_layers must be a list with one entry for each of the {num_layers} layers")
        layers = []
        for index, entry in enumerate(entries):
            try:
                layer = None if entry is None else MoeLayerConfig(**entry)
                if layer is not None and layer.ffn_kind != self.ffn_kind:
                    raise ValueError(f"ffn_kind is {layer.ffn_kind!r}, that of the model is {self.ffn_kind!r}")
                layers.append(layer)
            except (TypeError, ValueError) as error:
                raise ValueError(f"moe_layers[{index}]: {error}") from error
        return tuple(layers)


def read_qk_pairs(raw: Mapping[str, Any], config: ModelConfig) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """`ModelConfig.qk_pairs`. Raises ValueError if they do not fit the heads."""
    layers = raw.get("qk_pairs")
    if layers in (None, []):
        return ()
    if config.qk_norm != "none" or config.rotary_dim != config.head_dim:
        raise ValueError("qk_pairs: are given, but heads with norms or with channels that are not rotated cannot be pruned")
    if raw.get("nested_bits"):
        raise ValueError("qk_pairs: are given beside nested_bits, which is not supported")

    def fits(heads: Any) -> bool:
        return isinstance(heads, list) and len(heads) == config.num_key_value_heads and all(map(rises, heads))

    def rises(pairs: Any) -> bool:
        numbers = isinstance(pairs, list) and all(type(pair) is int and 0 <= pair < config.head_dim // 2 for pair in pairs)
        return numbers and bool(pairs) and all(low < high for low, high in zip(pairs, pairs[1:], strict=False))

    sound = isinstance(layers, list) and len(layers) == config.num_hidden_layers and all(map(fits, layers))
    if not sound or len({len(pairs) for heads in layers for pairs in heads}) != 1:
        raise ValueError(
            f"qk_pairs must have, for each of {config.num_hidden_layers} layers and {config.num_key_value_heads} key heads, "
            f"equally many rising numbers below {config.head_dim // 2}"
        )
    return tuple(tuple(tuple(pairs) for pairs in heads) for heads in layers)


CONVERTED = Converted(MOE_TYPE, use_sliding_window=False, partial_rotary_factor=1.0)
