"""Converted checkpoints in transformers: after `import ladimo`, `AutoModelForCausalLM.from_pretrained(MODEL)` loads them.

The model is a LlamaForCausalLM in which converted layers have our `ExpertLayer`. It runs under policy `full`, unless
`from_pretrained` gets the name of a policy or `set_policy` is called. Generation, caches and saving are those of transformers.

A nested checkpoint is loaded with its planes if the policy reads bits, or if it has nothing else. Such a model is not saved
again. Otherwise it is a model with whole weights, like any other.
"""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.utils import cached_file

from ladimo.checkpoint import TensorReader
from ladimo.model.config import MOE_TYPE, ModelConfig, MoeLayerConfig
from ladimo.model.families import find_family, read_model_config
from ladimo.model.layers import GeluMLP
from ladimo.model.moe import ExpertLayer, Experts
from ladimo.model.nested.layers import NestedHead, nest_layers, nest_tied
from ladimo.model.precision import KEY_VALUE_BITS
from ladimo.model.router import SELECTION_BIAS, LinearRouter, Router
from ladimo.policy import LayerRule, RoutingPolicy


class LadimoLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """LLaMA's configuration with more fields.

    `moe_layers` has one entry per layer, None for a layer with a dense FFN. `attention_output_bias`: whether the output
    projection of the attention has a bias; None means the same as `attention_bias`. `nested_bits` and `nested_top_bits`: None
    once a model is made, so that what is saved claims no planes. `family` is the type of the dense model; the others are those
    of `ModelConfig`.
    """

    model_type = MOE_TYPE
    moe_layers: list[dict[str, Any] | None] | None = None
    attention_output_bias: bool | None = None
    qk_norm: str = "none"
    norm_kind: str = "rms"
    ffn_kind: str = "swiglu"
    parallel_block: bool = False
    head_bias: bool = False
    family: str = "llama"
    nested_bits: list[int] | None = None
    nested_top_bits: int | None = None
    qk_pairs: list[list[list[int]]] | None = None


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
        ours = read_model_config(config.to_dict())
        if ours.rotary_dim < ours.head_dim:
            self.rotary_emb = _PartialRotaryEmbedding(config)
        output_bias = config.attention_bias if config.attention_output_bias is None else config.attention_output_bias
        if ours.parallel_block:
            for index in range(config.num_hidden_layers):
                self.layers[index] = _ParallelLayer(config, index)
        if ours.norm_kind == "layer":
            self.norm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)
        for layer, entry in zip(self.layers, config.moe_layers or [], strict=True):
            o_proj = layer.self_attn.o_proj
            _prepare_heads(layer.self_attn, ours)
            if output_bias != config.attention_bias:  # LLaMA has one flag for all four projections
                layer.self_attn.o_proj = nn.Linear(o_proj.in_features, o_proj.out_features, bias=output_bias)
            if ours.norm_kind == "layer":
                for name in ("input_layernorm", "post_attention_layernorm"):
                    if hasattr(layer, name):
                        setattr(layer, name, nn.LayerNorm(config.hidden_size, config.rms_norm_eps))
            if ours.ffn_kind == "gelu":
                layer.mlp = GeluMLP(config.hidden_size, config.intermediate_size)
            if entry is not None:
                layer.mlp = _HiddenStatesExpertLayer(config.hidden_size, MoeLayerConfig(**entry))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            init.normal_(module.gate_up_proj, 0.0, self.config.initializer_range)
            init.normal_(module.down_proj, 0.0, self.config.initializer_range)
            if module.up_bias is not None:
                init.zeros_(module.up_bias)
        if isinstance(module, ExpertLayer) and module.output_bias is not None:
            init.zeros_(module.output_bias)
        if isinstance(module, LinearRouter):
            init.normal_(module.weight, 0.0, self.config.initializer_range)
        if isinstance(module, Router) and module.e_score_correction_bias is not None:
            init.zeros_(module.e_score_correction_bias)


class LadimoLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    config_class = LadimoLlamaConfig
    lm_head: nn.Module  # a `_Head` if the model has planes
    # transformers reads the whole weights of a nested checkpoint, and nothing of its planes.
    _keys_to_ignore_on_load_unexpected = (r"[._](rounding|scales|high|low)$",)

    def __init__(self, config: LadimoLlamaConfig) -> None:
        if config.qk_pairs:
            raise ValueError("the checkpoint has pruned queries and keys, which transformers' LLaMA cannot compute")
        stored = read_model_config(config.to_dict())
        if stored.nested_top_bits is not None:  # `_nest` brings what transformers misses
            self._keys_to_ignore_on_load_missing = [r"_proj(\.weight)?$", r"^lm_head\.weight$", r"embed_tokens\.weight$"]
        config.nested_bits = config.nested_top_bits = None
        super().__init__(config)
        self.model = LadimoLlamaModel(config)
        if config.head_bias:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self._stored_config = stored
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """As in transformers' Phi-3: with rope type "longrope", a text that outgrows the original context changes frequencies.

        The keys so far are of no use then, and are computed again.
        """
        rope = read_model_config(self.config.to_dict()).rope
        for name in ("cache", "past_key_values"):  # its name in newer and in older releases
            cache, original = kwargs.get(name), rope.original_max_position_embeddings
            if rope.type == "longrope" and cache and cache.get_seq_length() <= original < input_ids.shape[1]:
                kwargs |= {name: None, "next_sequence_length": None}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    @classmethod
    def from_pretrained(cls, name: str, *arguments: Any, policy: str | None = None, **options: Any) -> Any:
        """Load a checkpoint, as transformers does. `policy`: the name of one of its policies, to run under.

        This option is for programs that can pass options but cannot call `set_policy`. Raises ValueError if the checkpoint has
        no such policy.
        """
        loaded = super().from_pretrained(name, *arguments, **options)
        model = loaded[0] if options.get("output_loading_info") else loaded
        stored = model._stored_config
        chosen = None if policy is None else _read_policy(name, policy)
        if chosen is not None:
            chosen.validate(stored)
        if stored.nested_top_bits is not None or (chosen is not None and _reads_bits(chosen)):
            model._nest(Path(cached_file(name, "config.json")).parent)
        if chosen is not None:
            model.set_policy(chosen.layers, chosen.head_bits, chosen.head_refine)
        return loaded

    def set_policy(
        self, rules: Sequence[LayerRule | None], head_bits: int | None = None, head_refine: float | None = None
    ) -> None:
        """Run under these rules, one per layer, None for a dense layer, and read so many bits of the output head.

        Raises ValueError if they do not fit the model, and for bits if it was loaded with whole weights only."""
        policy = RoutingPolicy("policy", "", tuple(rules), head_bits, head_refine)
        policy.validate(self._stored_config)
        head = self.lm_head if isinstance(self.lm_head, _Head) else None
        if head is None and _reads_bits(policy):
            raise ValueError(
                "the model was loaded with whole weights only; for policies of bits: from_pretrained(MODEL, policy=NAME)"
            )
        for layer, rule in zip(self.model.layers, rules, strict=True):
            if rule is not None:
                layer.mlp.rule = rule
            for name in ("q", "k", "v", "o") if head is not None else ():
                bits = None if rule is None else rule.attention_bits
                if bits is not None and name in "kv":
                    bits = max(bits, KEY_VALUE_BITS)
                getattr(layer.self_attn, f"{name}_proj").bits = bits
        if head is not None:
            head.bits, head.refine = head_bits, head_refine

    def save_pretrained(self, *arguments: Any, **options: Any) -> Any:
        """As in transformers. Raises ValueError for a model with planes."""
        if isinstance(self.lm_head, _Head):
            raise ValueError("a model that reads bits is not saved again; copy its checkpoint, or load it under policy full")
        return super().save_pretrained(*arguments, **options)

    def _nest(self, directory: Path) -> None:
        """Put the planes of the checkpoint into the model. Raises ValueError for a broken checkpoint."""
        reader, dtype, device = TensorReader(directory), self.dtype, self.device
        if self._stored_config.tie_word_embeddings:
            self.model.embed_tokens, self.lm_head = nest_tied(self.model.embed_tokens, reader, dtype, device)
        nest_layers(self, reader, dtype, device)
        assert isinstance(self.lm_head, NestedHead)
        self.lm_head = _Head(self.lm_head)
        for layer in self.model.layers:
            for name in ("q", "k", "v", "o"):
                projection = getattr(layer.self_attn, f"{name}_proj")
                projection.bits = None
                projection.register_forward_pre_hook(_with_bits)
            _hook_heads(layer.self_attn, self._stored_config)


class _Head(nn.Module):
    """A nested output head that transformers can call: hidden states [..., D] -> logits [..., V]."""

    def __init__(self, head: NestedHead) -> None:
        super().__init__()
        self.head = head
        self.bits: float | None = None
        self.refine: float | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.flatten(0, -2)
        bits, refine = (flat.new_full((len(flat),), _or_infinite(one), dtype=torch.float32) for one in (self.bits, self.refine))
        logits: Tensor = self.head.refined(flat, bits, refine)[0].unflatten(0, hidden_states.shape[:-1])
        return logits


def _reads_bits(policy: RoutingPolicy) -> bool:
    """Whether the policy reads some weights at fewer bits than all."""
    rules = [rule for rule in policy.layers if rule is not None]
    return policy.head_bits is not None or any(rule.bits is not None or rule.attention_bits is not None for rule in rules)


def _with_bits(projection: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of a nested projection, and how many bits all tokens read of it."""
    return *inputs, inputs[0].new_full((1,), _or_infinite(projection.bits), dtype=torch.float32)  # type: ignore[arg-type]


def _or_infinite(number: float | None) -> float:
    return math.inf if number is None else number


class _ParallelLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """A layer in which the FFN reads what the attention reads."""

    def __init__(self, config: LadimoLlamaConfig, layer: int) -> None:
        super().__init__(config, layer)
        del self.post_attention_layernorm

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        attended: Tensor = self.self_attn(hidden_states=normed, **options)[0]
        out: Tensor = hidden_states + attended + self.mlp(normed)
        return out


class _PartialRotaryEmbedding(Phi3RotaryEmbedding):  # type: ignore[misc]
    """Cosines and sines for LLaMA's attention, which rotates whole heads: the other channels are turned by nothing.

    LLaMA pairs the two halves of a head. So the channels are ordered as in `_prepare_output`.
    """

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = super().forward(x, position_ids)
        padding = (0, self.config.head_dim // 2 - cos.shape[-1] // 2)
        halves = [F.pad(part, padding, value=value) for part, value in ((cos.chunk(2, -1)[0], 1.0), (sin.chunk(2, -1)[0], 0.0))]
        return torch.cat((halves[0], halves[0]), -1), torch.cat((halves[1], halves[1]), -1)


def _prepare_heads(attention: LlamaAttention, config: ModelConfig) -> None:
    """Add what LLaMA's attention lacks, where the projections of queries and keys end. All else stays LLaMA's."""
    if config.qk_norm == "none" and config.rotary_dim == config.head_dim:
        return
    for name in ("q", "k"):
        if config.qk_norm != "none":
            size = config.head_dim if config.qk_norm == "head" else getattr(attention, f"{name}_proj").out_features
            setattr(attention, f"{name}_norm", LlamaRMSNorm(size, config.rms_norm_eps))
    _hook_heads(attention, config)


def _hook_heads(attention: LlamaAttention, config: ModelConfig) -> None:
    """Make the projections of queries and keys end with `_prepare_output`."""
    if config.qk_norm == "none" and config.rotary_dim == config.head_dim:
        return
    for name in ("q", "k"):
        hook = partial(_prepare_output, getattr(attention, f"{name}_norm", None), config.head_dim, config.rotary_dim)
        getattr(attention, f"{name}_proj").register_forward_hook(hook)


def _prepare_output(
    norm: LlamaRMSNorm | None, head_dim: int, rotary_dim: int, _module: nn.Module, _inputs: tuple[Tensor, ...], x: Tensor
) -> Tensor:
    """Queries or keys [..., heads * C], normed, with the channels of each head in the order of `_PartialRotaryEmbedding`.

    Attention multiplies queries with keys, so it does not matter in which order their channels are.
    """
    if norm is not None:
        x = norm(x.unflatten(-1, (-1, len(norm.weight)))).flatten(-2)
    if rotary_dim < head_dim:
        half, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
        first, second, *others = x.unflatten(-1, (-1, head_dim)).split((half, half, rest, rest), dim=-1)
        x = torch.cat((first, others[0], second, others[1]), dim=-1).flatten(-2)
    return x


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
