"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts in some layers or all, and a shared expert beside them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.families.moe_family import MoeFamily
from ladimo.model.fields import flag, positive_int, size


class Qwen2Moe(MoeFamily):
    """The model type `qwen2_moe`."""

    def read_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        return super().read_config({**raw, "attention_bias": flag(raw, "qkv_bias", True)})

    def read_layers(self, raw: Mapping[str, Any], num_layers: int) -> tuple[MoeLayerConfig | None, ...]:
        dense = raw.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
            raise ValueError(f"mlp_only_layers must be a list of layer numbers, got {dense!r}")
        step, shared = positive_int(raw, "decoder_sparse_step", 1), size(raw, "shared_expert_intermediate_size")
        return tuple(
            None
            if layer is None or index in dense or (index + 1) % step
            else replace(layer, shared_expert_intermediate_size=shared)
            for index, layer in enumerate(super().read_layers(raw, num_layers))
        )


QWEN2_MOE = Qwen2Moe(
    "qwen2_moe",
    num_key_value_heads=16,
    max_position_embeddings=32768,
    output_bias=False,
    sliding_window=4096,
    use_sliding_window=False,
    defaults={
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    width_field="moe_intermediate_size",
)
