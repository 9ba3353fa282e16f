"""Converted checkpoints in transformers: after `import ladimo`, `AutoModelForCausalLM.from_pretrained(MODEL)` loads them.

The model is a LlamaForCausalLM in which converted layers have our `ExpertLayer`. It runs under policy `full`, unless
`from_pretrained` gets the name of a policy or `set_policy` is called. Generation, caches and saving are those of transformers.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.utils import cached_file

from ladimo.model.config import MOE_TYPE, MoeLayerConfig
from ladimo.model.families import find_family, read_model_config
from ladimo.model.moe import ExpertLayer, Experts
from ladimo.model.router import SELECTION_BIAS, LinearRouter, Router
from ladimo.policy import LayerRule, RoutingPolicy


class LadimoLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """LLaMA's configuration with more fields.

    `moe_layers` has one entry per layer, None for a layer with a dense FFN. `attention_output_bias`: whether the output
    projection of the attention has a bias; None means the same as `attention_bias`. `family`: the type of the dense model.
    `qk_norm`: see `ModelConfig`. `nested_bits`: None once a model is made, because transformers holds the whole weights only.
    """

    model_type = MOE_TYPE
    moe_layers: list[dict[str, Any] | None] | None = None
    attention_output_bias: bool | None = None
    qk_norm: str = "none"
    family: str = "llama"
    nested_bits: list[int] | None = None


class _HiddenStatesExpertLayer(ExpertLayer):
    """An ExpertLayer that transformers can call as an FFN: hidden states [B, S, D] -> [B, S, D]. Its rule is an attribute."""

    def __init__(self, hidden_size: int, layer: MoeLayerConfig) -> None:
        super().__init__(hidden_size, layer)
        self.rule = LayerRule.full(layer)

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        flat = hidden_states.flatten(0, -2)
        policy = RoutingPolicy("layer", "", (self.rule,))
        rows, allowed = policy.to_rows(self.config.num_experts)
        row = torch.tensor(rows[0], device=flat.device).expand(len(flat), -1)
        mask = torch.tensor(allowed, device=flat.device).expand(len(flat), -1)
        out, *_ = super().forward(flat, row, mask)
        return out.view_as(hidden_states)


class LadimoLlamaModel(LlamaModel):  # type: ignore[misc]
    config_class = LadimoLlamaConfig
    _keep_in_fp32_modules_strict = [SELECTION_BIAS]

    def __init__(self, config: LadimoLlamaConfig) -> None:
        if find_family(config.family).has_own_modules:
            raise ValueError(f"family {config.family}: transformers' LLaMA cannot stand in for its modules")
        super().__init__(config)
        output_bias = config.attention_bias if config.attention_output_bias is None else config.attention_output_bias
        for layer, entry in zip(self.layers, config.moe_layers or [], strict=True):
            o_proj = layer.self_attn.o_proj
            if config.qk_norm != "none":
                _add_norms(layer.self_attn, config)
            if output_bias != config.attention_bias:  # LLaMA has one flag for all four projections
                layer.self_attn.o_proj = nn.Linear(o_proj.in_features, o_proj.out_features, bias=output_bias)
            if entry is not None:
                layer.mlp = _HiddenStatesExpertLayer(config.hidden_size, MoeLayerConfig(**entry))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            init.normal_(module.gate_up_proj, 0.0, self.config.initializer_range)
            init.normal_(module.down_proj, 0.0, self.config.initializer_range)
        if isinstance(module, LinearRouter):
            init.normal_(module.weight, 0.0, self.config.initializer_range)
        if isinstance(module, Router) and module.e_score_correction_bias is not None:
            init.zeros_(module.e_score_correction_bias)


class LadimoLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    config_class = LadimoLlamaConfig
    # transformers holds the whole weights of a nested checkpoint, and nothing of its planes.
    _keys_to_ignore_on_load_unexpected = (r"[._](rounding|scales)$",)

    def __init__(self, config: LadimoLlamaConfig) -> None:
        config.nested_bits = None
        super().__init__(config)
        self.model = LadimoLlamaModel(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name: str, *arguments: Any, policy: str | None = None, **options: Any) -> Any:
        """Load a checkpoint, as transformers does. `policy`: the name of one of its policies, to run under.

        This option is for programs that can pass options but cannot call `set_policy`. Raises ValueError if the checkpoint has
        no such policy.
        """
        loaded = super().from_pretrained(name, *arguments, **options)
        if policy is not None:
            model = loaded[0] if options.get("output_loading_info") else loaded
            chosen = _read_policy(name, policy)
            chosen.validate(read_model_config(model.config.to_dict()))
            model.set_policy(chosen.layers)
        return loaded

    def set_policy(self, rules: Sequence[LayerRule | None]) -> None:
        """Run under these rules, one per layer, None for a dense layer. Raises ValueError if they do not fit the model."""
        RoutingPolicy("policy", "", tuple(rules)).validate(read_model_config(self.config.to_dict()))
        for layer, rule in zip(self.model.layers, rules, strict=True):
            if rule is not None:
                layer.mlp.rule = rule


def _add_norms(attention: LlamaAttention, config: LadimoLlamaConfig) -> None:
    """Give an attention norms of queries and keys. They are computed where the projections end, so all else is LLaMA's."""
    for name in ("q", "k"):
        projection = getattr(attention, f"{name}_proj")
        size = config.head_dim if config.qk_norm == "head" else projection.out_features
        setattr(attention, f"{name}_norm", LlamaRMSNorm(size, config.rms_norm_eps))
        projection.register_forward_hook(partial(_norm_output, getattr(attention, f"{name}_norm")))


def _norm_output(norm: LlamaRMSNorm, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    normed: Tensor = norm(output.unflatten(-1, (-1, len(norm.weight)))).flatten(-2)
    return normed


def _read_policy(name: str, policy: str) -> RoutingPolicy:
    """Read a policy from a directory or a hub id. Raises ValueError."""
    try:
        file = cached_file(name, f"routing/policies/{policy}.json")
        raw = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{name}: has no policy {policy!r} ({' '.join(str(error).split())})") from error
    return RoutingPolicy.from_dict(raw)


# This replaces the entry that `import ladimo` made.
AutoConfig.register(MOE_TYPE, LadimoLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(LadimoLlamaConfig, LadimoLlamaForCausalLM, exist_ok=True)
