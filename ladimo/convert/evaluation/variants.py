"""Runs many variants of one model in one pass over its layers.

A variant has one choice per layer: None for the layer's own FFN, or a rule for the expert layer. The own FFN of a converted
layer is the layer under policy `full`. Variants with equal choices up to a
layer share their hidden states up to it. Legend: B sequences, S positions, D hidden_size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ladimo.convert.ffn.expert_layer import run_ffn, run_rule
from ladimo.convert.progress import track
from ladimo.convert.streamed_model import ExpertSource, StreamedModel
from ladimo.model.config import ModelConfig
from ladimo.model.moe import ExpertLayer
from ladimo.model.nested.layers import NestedHead
from ladimo.model.nested.refinement import refine_words
from ladimo.model.transformer import DecoderLayer
from ladimo.policy import LayerRule, RoutingPolicy

PASS_BYTES = 2**31  # bytes of hidden states on the host in one pass over the layers, for all variants together
# One rule per layer; None: a dense layer. A nested model has one more rule, whose `bits` are for the output head.
Rules = tuple[LayerRule | None, ...]
DISTINCT_BATCH = 32  # the tokens of a batch in which different experts are counted


@dataclass(frozen=True, slots=True)
class Ran:
    """What ran in one expert layer, as means.

    per_token: experts of a token. distinct: different experts of a batch of 32 tokens. refined, distinct_refined: the same of
    refined neurons."""

    per_token: float
    distinct: float
    refined: float
    distinct_refined: float


def run_variants(
    model: StreamedModel, experts: ExpertSource | None, batches: Sequence[Tensor], wanted: Sequence[Rules]
) -> tuple[dict[Rules, list[Tensor]], dict[Rules, tuple["Ran | None", ...]]]:
    """Run batches of token ids [B, S] through all layers. For each variant, return the hidden states [B, S, D] of every batch,
    and what ran in every layer; None: a dense layer."""
    states: dict[Rules, list[Tensor]] = {(): [model.embed(batch) for batch in batches]}
    per_layer: dict[Rules, Ran | None] = {}
    for index in track(range(model.config.num_hidden_layers), "layers"):
        layer = model.layer(index)
        expert_layer: ExpertLayer | None = None
        if any(variant[index] is not None for variant in wanted):
            expert_layer = (experts or model.experts)(index)
        advanced: dict[Rules, list[Tensor]] = {}
        for prefix in list(states):
            branches = list(dict.fromkeys(variant[: index + 1] for variant in wanted if variant[:index] == prefix))
            new_states, counts = _advance(model, layer, expert_layer, states.pop(prefix), branches)
            advanced |= new_states
            per_layer |= counts
        states = advanced
    layers = range(model.config.num_hidden_layers)
    # States are stored by layers only. The output head runs later.
    ended = {variant: states[variant[: len(layers)]] for variant in wanted}
    return ended, {variant: tuple(per_layer[variant[: index + 1]] for index in layers) for variant in wanted}


def variant_of(policy: RoutingPolicy, config: ModelConfig) -> Rules:
    """The policy as a variant of the model."""
    return (
        (*policy.layers, LayerRule(1, bits=policy.head_bits, refine=policy.head_refine))
        if config.nested_bits
        else policy.layers
    )


def policy_of(name: str, description: str, rules: Rules, config: ModelConfig) -> RoutingPolicy:
    """The inverse of `variant_of`."""
    if not config.nested_bits:
        return RoutingPolicy(name, description, rules)
    head = rules[-1]
    assert head is not None
    return RoutingPolicy(name, description, rules[:-1], head.bits, head.refine)


def logits(model: StreamedModel, variant: Rules, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
    """Final norm and output head of a variant: [R, D] -> [R, V], and whether each word was refined, bool [R, V]; None if the
    variant refines none."""
    rule = variant[-1] if model.config.nested_bits else None
    if rule is None or rule.bits is None:
        return model.ends.logits(hidden_states), None
    head = model.ends.lm_head
    assert isinstance(head, NestedHead)
    bits = hidden_states.new_full((len(hidden_states),), rule.bits)
    normed = model.ends.model.norm(hidden_states)
    if rule.refine is None:
        return head(normed, bits), None
    return refine_words(normed, head(normed, bits), head.nested, torch.full_like(bits, rule.refine), head.bias)


def _advance(
    model: StreamedModel,
    layer: DecoderLayer,
    expert_layer: ExpertLayer | None,
    batches: Sequence[Tensor],
    branches: list[Rules],
) -> tuple[dict[Rules, list[Tensor]], dict[Rules, Ran | None]]:
    """Run the hidden states [B, S, D] of every batch through one layer, once per branch. Return the states and what ran."""
    states = {branch: [torch.empty_like(batch) for batch in batches] for branch in branches}
    ids: dict[Rules, list[Tensor]] = {branch: [] for branch in branches}
    neurons = {branch: torch.zeros(2, dtype=torch.float64) for branch in branches}  # refined by all tokens, distinct ones
    for number, hidden_states in enumerate(batches):
        for bits, same in _by_attention_bits(branches):
            for rows, attended, ffn_inputs in model.attend(layer, hidden_states, bits):
                for branch in same:
                    rule = branch[-1]
                    if rule is None:
                        out = run_ffn(layer.mlp, ffn_inputs)
                    else:
                        assert expert_layer is not None
                        out, topk_ids, refined = run_rule(expert_layer, ffn_inputs, rule)
                        if refined is not None:
                            neurons[branch] += len(refined) * refined_rows(refined)
                        ids[branch].append(topk_ids.to("cpu", torch.int16))
                    states[branch][number][rows] = (attended + out).view(hidden_states[rows].shape).cpu()
    ran: dict[Rules, Ran | None] = {}
    for branch in branches:
        ran[branch] = None
        if branch[-1] is not None:
            assert expert_layer is not None
            every = torch.cat(ids[branch]).long()
            needed = (every >= 0).sum(dim=1)
            distinct = distinct_experts(every, needed, expert_layer.config.num_experts)
            ran[branch] = Ran(needed.float().mean().item(), distinct, *(neurons[branch] / len(every)).tolist())
    return states, ran


def _by_attention_bits(branches: Sequence[Rules]) -> Iterator[tuple[int | None, list[Rules]]]:
    """Yield the branches in groups whose attention reads the same number of bits."""
    wanted = [None if branch[-1] is None else branch[-1].attention_bits for branch in branches]
    for bits in dict.fromkeys(wanted):
        yield bits, [branch for branch, own in zip(branches, wanted, strict=True) if own == bits]


def distinct_experts(ids: Tensor, needed: Tensor, num_experts: int) -> float:
    """The mean number of different experts in a batch of DISTINCT_BATCH random tokens. Token t runs the first needed[t] experts
    of ids[t]. ids: [T, K], needed: [T]. If there are fewer tokens, they are one batch."""
    hit = torch.zeros(len(ids), num_experts + 1)
    places = torch.where(torch.arange(ids.shape[1]) < needed[:, None], ids, num_experts)
    hit.scatter_(1, places, 1.0)
    batches = random_batches(len(ids))
    return float(sum(hit[batch, :num_experts].amax(dim=0).sum().item() for batch in batches) / len(batches))


def refined_rows(refined: Tensor) -> Tensor:
    """From whether each row is refined by each token, bool [T, N]: the mean number of rows per token, and of different rows per
    batch of DISTINCT_BATCH random tokens, [2] fp64 on the host. If there are fewer tokens, they are one batch."""
    batches = random_batches(len(refined))
    distinct = sum(int(refined[batch.to(refined.device)].any(dim=0).sum()) for batch in batches) / len(batches)
    return torch.tensor([int(refined.sum()) / len(refined), distinct], dtype=torch.float64)


def random_batches(count: int) -> tuple[Tensor, ...]:
    """The numbers of `count` tokens in random batches of DISTINCT_BATCH. Tokens that are left over are in no batch."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    batches: tuple[Tensor, ...] = order[: max(1, count // DISTINCT_BATCH) * DISTINCT_BATCH].split(DISTINCT_BATCH)
    return batches
