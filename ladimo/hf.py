"""transformers' view of a converted checkpoint: `AutoModelForCausalLM.from_pretrained(MODEL)` after `import ladimo`.

A LlamaForCausalLM whose converted layers hold our `ExpertLayer`, run under policy `full` (each layer's own number of experts)
unless `set_policy` is called. Generation, caches and saving are transformers' own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers import initialization as init

from ladimo.model.config import MOE_TYPE, ModelConfig, MoeLayerConfig
from ladimo.model.moe import ExpertLayer, Experts
from ladimo.policy import LayerRule, RoutingPolicy


class LadimoLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """LLaMA's configuration and `moe_layers`: one entry per layer, null where the FFN stayed dense."""

    model_type = MOE_TYPE
    moe_layers: list[dict[str, Any] | None] | None = None


class _HiddenStatesExpertLayer(ExpertLayer):
    """An ExpertLayer called as transformers calls an FFN: hidden states [B, S, D] in and out, the rule held as state."""

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__(hidden_size, layer)
        self.rule = LayerRule(top_k=layer.num_experts_per_tok, renormalize=layer.expert_weight == "score")

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        flat = hidden_states.flatten(0, -2)
        policy = RoutingPolicy("layer", "", (self.rule,))
        rows, allowed = policy.to_rows(self.config.num_experts)
        row = torch.tensor(rows, device=flat.device).expand(len(flat), 4)
        mask = torch.tensor(allowed, device=flat.device).expand(len(flat), -1)
        out, _ = super().forward(flat, row, mask)
        return out.view_as(hidden_states)


class LadimoLlamaModel(LlamaModel):  # type: ignore[misc]
    config_class = LadimoLlamaConfig

    def __init__(self, config: LadimoLlamaConfig) -> None:
        super().__init__(config)
        for layer, entry in zip(self.layers, config.moe_layers or [], strict=True):
            if entry is not None:
                layer.mlp = _HiddenStatesExpertLayer(config.hidden_size, MoeLayerConfig(**entry))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            init.normal_(module.gate_up_proj, 0.0, self.config.initializer_range)
            init.normal_(module.down_proj, 0.0, self.config.initializer_range)


class LadimoLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    config_class = LadimoLlamaConfig

    def __init__(self, config: LadimoLlamaConfig) -> None:
        super().__init__(config)
        self.model = LadimoLlamaModel(config)
        self.post_init()

    def set_policy(self, rules: Sequence[LayerRule | None]) -> None:
        """Run under these rules, one per layer, None where the layer is dense. Raises ValueError when they do not fit."""
        RoutingPolicy("policy", "", tuple(rules)).validate(ModelConfig.from_dict(self.config.to_dict()))
        for layer, rule in zip(self.model.layers, rules, strict=True):
            if rule is not None:
                layer.mlp.rule = rule


def register() -> None:
    """Make the type known to transformers' Auto classes. Safe to call twice."""
    AutoConfig.register(MOE_TYPE, LadimoLlamaConfig, exist_ok=True)
    AutoModelForCausalLM.register(LadimoLlamaConfig, LadimoLlamaForCausalLM, exist_ok=True)
