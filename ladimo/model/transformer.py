"""The whole model: a LLaMA in which FFNs may be expert layers. Parameters have the names of Hugging Face.

Legend: T tokens in the step, R tokens whose logits are wanted, V vocabulary, D hidden_size, M expert layers, E experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.backends.torch_backend import BackendModule
from ladimo.model.config import ModelConfig
from ladimo.model.families import find_family
from ladimo.model.inputs import RoutingTables, StepInputs, StepOutput
from ladimo.model.layers import FFNS, Linear, Norm, RotaryEmbedding, make_norm
from ladimo.model.moe import ExpertLayer
from ladimo.model.nested.layers import NestedEmbedding, NestedHead
from ladimo.model.rule import RuleNumber


class DecoderLayer(nn.Module):
    """One layer: attention, and a dense FFN or an expert layer. `layer` counts from 0.

    The FFN follows the attention, each with a norm before it. In a parallel block both read the same norm.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.nested = layer, bool(config.nested_bits)
        self.input_layernorm = make_norm(config)
        family = find_family(config.family)
        self.self_attn = family.attention(config, layer)
        self.post_attention_layernorm: Norm | None = None if config.parallel_block else make_norm(config)
        moe = config.layers[layer]
        self.mlp: nn.Module = (
            (family.ffn or FFNS[config.ffn_kind])(config.hidden_size, config.intermediate_size)
            if moe is None
            else ExpertLayer(config.hidden_size, moe)
        )

    def attend(
        self,
        hidden_states: Tensor,
        rope: tuple[Tensor, Tensor],
        inputs: StepInputs,
        kv_cache: KVCache | None,
        *bits: Tensor,
        attention: nn.Module | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The first half of the layer: the hidden states [T, D] plus their attention, and the inputs [T, D] of the FFN.

        `bits` [T]: of a nested layer's attention weights that each token reads. `attention`: used in place of the layer's.
        `added` [T, D]: what is still to be added to the hidden states.
        """
        if added is None:
            normed = self.input_layernorm(hidden_states)
        else:
            normed, hidden_states = self.input_layernorm.add(added, hidden_states)
        # A family's own attention knows no bits.
        attended: Tensor = (attention or self.self_attn)(normed, rope, inputs, kv_cache, *((bits,) if bits else ()))
        if self.post_attention_layernorm is None:
            return hidden_states + attended, normed
        ffn_inputs, hidden_states = self.post_attention_layernorm.add(attended, hidden_states)
        return hidden_states, ffn_inputs

    def forward(
        self,
        hidden_states: Tensor,
        rope: tuple[Tensor, Tensor],
        inputs: StepInputs,
        kv_cache: KVCache | None,
        rules: tuple[Tensor, Tensor] | None,
        num_budgeted: int = 0,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Hidden states [T, D] -> hidden states after the attention and the output of the FFN, both [T, D], the experts that
        ran [T, E], and the refined neurons [T, G] of a nested layer.

        The FFN's output is not added yet: the next layer's norm does that (`added`), in the same pass over memory.
        `rules` are those of `RoutingTables.rules`. Their batch budgets apply to the first `num_budgeted` tokens. A dense layer
        needs no rules and returns None for the experts.
        """
        bits = (rules[0][:, self.layer, RuleNumber.ATTENTION_BITS],) if self.nested and rules is not None else ()
        hidden_states, ffn_inputs = self.attend(hidden_states, rope, inputs, kv_cache, *bits, added=added)
        if not isinstance(self.mlp, ExpertLayer):
            return hidden_states, self.mlp(ffn_inputs), None, None
        assert rules is not None
        rows, allowed = rules
        mask = allowed[:, self.layer, : self.mlp.config.num_experts]
        out, topk_ids, refined = self.mlp(ffn_inputs, rows[:, self.layer], mask, num_budgeted)
        return hidden_states, out, topk_ids, refined


class Backbone(nn.Module):
    """Embedding, layers and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Zeros, as the weights come from a checkpoint: drawing them on device "meta" would import torch's compiler (2 s).
        weights = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens: nn.Embedding | NestedEmbedding = nn.Embedding.from_pretrained(weights, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)


class MoeTransformer(BackendModule):
    """LLaMA with dense and expert layers. With `tie_word_embeddings` `lm_head` is None, and the embedding is the output
    head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head: Linear | NestedHead | None = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.rotary = RotaryEmbedding(config)

    def forward(self, inputs: StepInputs, kv_cache: KVCache | None, tables: RoutingTables) -> StepOutput:
        """One step, in the operations of the back end.

        On a GPU, a step that only decodes does not wait for the device, and its shapes do not depend on data. So a CUDA graph
        can capture it.
        """
        hidden_states = self.model.embed_tokens(inputs.input_ids)
        length = inputs.length if kv_cache is None else None
        rope = self.rotary(inputs.positions, hidden_states.dtype, length)
        rules = tables.rules(inputs.policy_ids) if self.config.moe_layer_indices or self.config.nested_bits else None
        num_budgeted = inputs.num_decode if tables.batch_budgets else 0
        expert_ids: list[Tensor | None] = []
        refined: list[Tensor | None] = []
        added: Tensor | None = None
        for layer in self.model.layers:
            hidden_states, added, topk_ids, neurons = layer(hidden_states, rope, inputs, kv_cache, rules, num_budgeted, added)
            expert_ids.append(topk_ids)
            refined.append(neurons)
        wanted = slice(None) if inputs.logit_indices is None else inputs.logit_indices
        assert added is not None
        last = hidden_states[wanted] + added[wanted]
        if not isinstance(self.lm_head, NestedHead):
            return StepOutput(self.logits(last), self._stack(expert_ids))
        assert rules is not None
        bits, refine = (rules[0][wanted, -1, number] for number in (RuleNumber.BITS, RuleNumber.REFINE))
        logits, words = self.lm_head.refined(self.model.norm(last), bits, refine)
        every = words.new_zeros(len(hidden_states), words.shape[1])
        every[wanted] = words
        none = torch.zeros_like(every)
        counts = [none if neurons is None else neurons for neurons in refined]
        return StepOutput(logits, self._stack(expert_ids), torch.stack((*counts, every)))

    def step(self, inputs: StepInputs, kv_cache: KVCache, tables: RoutingTables) -> StepOutput:
        """One step over the KV cache. The back end runs `forward`, or its own compiled code for the same."""
        return self.backend.step(self, inputs, kv_cache, tables)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Final norm and output head: [R, D] -> [R, V]. Of a nested head all bits are read."""
        normed: Tensor = self.model.norm(hidden_states)
        if self.lm_head is None:
            return self.backend.linear(normed, self.model.embed_tokens.weight)
        logits: Tensor = self.lm_head(normed)
        return logits

    def _stack(self, expert_ids: list[Tensor | None]) -> Tensor | None:
        """The ids of all layers, each [T, experts of the layer] or None -> one tensor [L, T, E], padded with -1."""
        chosen = [ids for ids in expert_ids if ids is not None]
        if not chosen:
            return None
        width = self.config.max_num_experts
        none = chosen[0].new_full((chosen[0].shape[0], 0), -1)
        return torch.stack([_widen(none if ids is None else ids, width) for ids in expert_ids])


def _widen(ids: Tensor, width: int) -> Tensor:
    """Ids [T, experts of the layer] -> [T, width], padded with -1. `F.pad` would copy even if there is nothing to add."""
    return ids if ids.shape[1] == width else F.pad(ids, (0, width - ids.shape[1]), value=-1)
