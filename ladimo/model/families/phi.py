"""Phi-1, Phi-1.5 and Phi-2: attention and FFN read one LayerNorm, FFNs have no gate, and every projection has a bias."""

from collections.abc import Mapping
from typing import Any

from ladimo.model.config import ModelConfig
from ladimo.model.families.family import Family, Stored
from ladimo.model.fields import flag

# Our names of modules, and those in a checkpoint of the family.
NAMES = {"self_attn.o_proj": "self_attn.dense", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}


class Phi(Family):
    """The model type `phi`."""

    def read_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        if flag(raw, "qk_layernorm"):
            raise ValueError("qk_layernorm is true; supported: false")
        return super().read_config({**raw, "rms_norm_eps": raw.get("layer_norm_eps", 1e-5)})

    def locate(self, name: str, config: ModelConfig) -> Stored:
        """Where a checkpoint of the family stores the parameter that our network calls `name`."""
        if name.startswith("model.norm."):
            return Stored(name.replace(".norm.", ".final_layernorm."))
        for ours, stored in NAMES.items():
            name = name.replace(f".{ours}.", f".{stored}.")
        return Stored(name)


PHI = Phi(
    "phi",
    qkv_bias=True,
    output_bias=True,
    norm_kind="layer",
    ffn_kind="gelu",
    parallel_block=True,
    head_bias=True,
    partial_rotary_factor=0.5,
)
