"""OLMoE: experts in every layer, and norms over all queries and over all keys of a token."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ladimo.model.attention import Attention
from ladimo.model.config import ModelConfig
from ladimo.model.families.moe_family import MoeFamily
from ladimo.model.layers import RMSNorm


class NormedAttention(Attention):
    """LLaMA's attention with a norm of queries and one of keys, each over all heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.q_norm = RMSNorm(self.num_heads * self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.num_kv_heads * self.head_dim, config.rms_norm_eps)

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)


class Olmoe(MoeFamily):
    """The model type `olmoe`."""

    def read_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        if raw.get("clip_qkv") is not None:
            raise ValueError(f"clip_qkv is {raw['clip_qkv']!r}; supported: null")
        return super().read_config(raw)


OLMOE = Olmoe(
    "olmoe",
    max_position_embeddings=4096,
    attention=NormedAttention,
    defaults={"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 2048},
)
