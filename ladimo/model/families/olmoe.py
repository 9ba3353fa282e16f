"""OLMoE: experts in every layer, and norms over all queries and over all keys of a token."""

from collections.abc import Mapping
from typing import Any

from ladimo.model.config import ModelConfig
from ladimo.model.families.moe_family import MoeFamily


class Olmoe(MoeFamily):
    """The model type `olmoe`."""

    def read_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        if raw.get("clip_qkv") is not None:
            raise ValueError(f"clip_qkv is {raw['clip_qkv']!r}; supported: null")
        return super().read_config(raw)


OLMOE = Olmoe(
    "olmoe",
    max_position_embeddings=4096,
    qk_norm="all",
    defaults={"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 2048},
)
