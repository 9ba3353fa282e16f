"""Families that were trained as Mixture-of-Experts. Their checkpoints store each expert by itself, and we stack them.

Their routers are linear and score by softmax.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.families.family import Family, Stacked, Stored
from ladimo.model.fields import flag, positive_int, size

EXPERTS = ".mlp.experts."


@dataclass(frozen=True)
class MoeFamily(Family):
    """One `model_type`. Fields of config.json that are not in `defaults` and have no default in `Family` must be in the file.

    defaults: values for fields that config.json leaves out, by their names there.
    experts_field, width_field: the fields with the number of experts, and with the neurons of one.
    norm_topk_prob: whether weights are divided by their sum; None means that the file decides, and that it is false by default.
    block: the name of an expert layer on disk. matrices: the names of an expert's gate, up and down projection on disk.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    experts_field: str = "num_experts"
    width_field: str = "intermediate_size"
    norm_topk_prob: bool | None = None
    block: str = "mlp"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def read_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        return replace(super().read_config({**self.defaults, **raw}), trained_as_moe=True)

    def read_layers(self, raw: Mapping[str, Any], num_layers: int) -> tuple[MoeLayerConfig | None, ...]:
        layer = MoeLayerConfig(
            num_experts=size(raw, self.experts_field),
            num_experts_per_tok=positive_int(raw, "num_experts_per_tok"),
            moe_intermediate_size=size(raw, self.width_field),
            norm_topk_prob=flag(raw, "norm_topk_prob") if self.norm_topk_prob is None else self.norm_topk_prob,
        )
        return (layer,) * num_layers

    def locate(self, name: str, config: ModelConfig) -> Stored | Stacked:
        """Where a checkpoint of the family stores the parameter that our network calls `name`."""
        parts = name.split(".")
        if ".mlp." not in name or config.layers[int(parts[2])] is None:
            return Stored(name)
        stored = name.replace(".mlp.", f".{self.block}.")
        if EXPERTS not in name:
            return Stored(stored)
        layer = config.layers[int(parts[2])]
        assert layer is not None
        prefix, matrix = stored.rsplit(".", 1)
        kinds = self.matrices[:2] if matrix == "gate_up_proj" else self.matrices[2:]
        return Stacked(tuple(tuple(f"{prefix}.{e}.{kind}.weight" for kind in kinds) for e in range(layer.num_experts)))
