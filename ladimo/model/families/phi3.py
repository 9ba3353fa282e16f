"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: LLaMA with fused projections on disk.

Phi-4-mini rotates a part of each head only. Models with a long context have rotary frequencies for short and for long texts.
"""

from collections.abc import Mapping
from typing import Any

from ladimo.model.config import ModelConfig
from ladimo.model.families.family import Family, Stored

# What "longrope" was called in earlier configuration files of the family.
EARLIER_NAMES = ("su", "yarn")


class Phi3(Family):
    """The model type `phi3`."""

    def read_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        raw = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, **raw}
        for name in ("rope_parameters", "rope_scaling"):
            rope = raw.get(name)
            if isinstance(rope, Mapping) and (rope.get("rope_type") or rope.get("type")) in EARLIER_NAMES:
                raw = {**raw, name: {**rope, "rope_type": "longrope"}}
        return super().read_config(raw)

    def locate(self, name: str, config: ModelConfig) -> Stored:
        """Where a checkpoint of the family stores the parameter that our network calls `name`."""
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        # The last part of a fused matrix has no end, so that a matrix with too many rows is found.
        parts = {
            "q_proj": ("qkv_proj", slice(0, heads)),
            "k_proj": ("qkv_proj", slice(heads, heads + kv_heads)),
            "v_proj": ("qkv_proj", slice(heads + kv_heads, None)),
            "gate_proj": ("gate_up_proj", slice(0, config.intermediate_size)),
            "up_proj": ("gate_up_proj", slice(config.intermediate_size, None)),
        }
        *_, module, _ = ("", *name.split("."))
        if module not in parts:
            return Stored(name)
        fused, rows = parts[module]
        return Stored(name.replace(module, fused), rows)


PHI3 = Phi3("phi3", max_position_embeddings=4096, qkv_bias=False, output_bias=False, partial_rotary_factor=1.0)
