"""Perplexity, cost and agreement with the dense model of many variants of one model, in one streaming pass over its layers.

A variant is one choice per layer: None for the dense FFN, a rule for the expert layer under that rule. Variants that agree up
to a layer share their hidden states up to it. Legend: B sequences, S positions, D hidden_size.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ladimo.convert.choose_policy import Rules
from ladimo.convert.distill import route, run_experts
from ladimo.convert.teacher import StreamedModel
from ladimo.model.config import ModelConfig
from ladimo.model.moe import ExpertLayer
from ladimo.model.transformer import DecoderLayer
from ladimo.policy import RoutingPolicy

MAX_LOSS = 700.0  # nats; a perplexity above e^700 is no number any more
ExpertSource = Callable[[int], ExpertLayer]


@dataclass(frozen=True, slots=True)
class Measurement:
    """experts_per_token: mean per layer, None where dense. next_token_agreement: share of tokens whose most likely next token
    is the reference's. kl: mean KL divergence from the reference's next-token distribution, in nats; both None without one."""

    perplexity: float
    experts_per_token: tuple[float | None, ...]
    next_token_agreement: float | None
    kl: float | None


def measure(
    model: StreamedModel,
    experts: ExpertSource | None,
    blocks: Tensor,
    variants: Iterable[Rules],
    reference: Rules | None = None,
) -> dict[Rules, Measurement]:
    """Run token blocks [B, S] through every variant. `experts(i)` gives layer i's expert layer on the model's device; without
    it they are the model's own. `reference` must be one of the variants."""
    wanted = list(dict.fromkeys(variants))
    assert reference is None or reference in wanted
    states: dict[Rules, Tensor] = {(): model.embed(blocks)}
    per_layer: dict[Rules, float | None] = {}
    for index in tqdm(range(model.config.num_hidden_layers), desc="  layers", leave=False, disable=None):
        layer = model.layer(index)
        expert_layer: ExpertLayer | None = None
        if any(variant[index] is not None for variant in wanted):
            expert_layer = experts(index) if experts is not None else _own_experts(layer)
        advanced: dict[Rules, Tensor] = {}
        for prefix in list(states):
            branches = list(dict.fromkeys(variant[: index + 1] for variant in wanted if variant[:index] == prefix))
            new_states, counts = _advance(model, layer, expert_layer, states.pop(prefix), branches)
            advanced |= new_states
            per_layer |= counts
        states = advanced
    scores = _score(model, blocks, states, reference)
    return {
        variant: Measurement(
            perplexity=math.exp(scores[variant][0]),
            experts_per_token=tuple(per_layer[variant[: index + 1]] for index in range(len(variant))),
            next_token_agreement=scores[variant][1],
            kl=scores[variant][2],
        )
        for variant in wanted
    }


def figures(policy: RoutingPolicy, measurement: Measurement, config: ModelConfig, dense: float | None) -> dict[str, object]:
    """One policy's entry in the JSON of `ladimo evaluate` and in report.json; dense: the dense source's perplexity."""
    return {
        "policy": policy.name,
        "version": policy.version,
        "perplexity": measurement.perplexity,
        "perplexity_ratio": None if dense is None else measurement.perplexity / dense,
        "active_parameters_ratio": config.active_parameters_ratio(measurement.experts_per_token),
        "experts_per_token": list(measurement.experts_per_token),
        "next_token_agreement": measurement.next_token_agreement,
        "kl": measurement.kl,
    }


def num_scored(blocks: Tensor) -> int:
    """Tokens that a perplexity over these blocks is the mean of."""
    return blocks[:, 1:].numel()


def _own_experts(layer: DecoderLayer) -> ExpertLayer:
    assert isinstance(layer.mlp, ExpertLayer)
    return layer.mlp


def _advance(
    model: StreamedModel, layer: DecoderLayer, expert_layer: ExpertLayer | None, hidden_states: Tensor, branches: list[Rules]
) -> tuple[dict[Rules, Tensor], dict[Rules, float | None]]:
    """Hidden states [B, S, D] through one layer, once per branch: the states after it and the mean experts per token."""
    states = {branch: torch.empty_like(hidden_states) for branch in branches}
    chosen = dict.fromkeys(branches, 0)
    for rows, attended, ffn_inputs in model.attend(layer, hidden_states):
        for branch in branches:
            rule = branch[-1]
            if rule is None:
                out = layer.mlp(ffn_inputs)
            else:
                assert expert_layer is not None
                _, topk_weights, topk_ids = route(expert_layer, ffn_inputs, rule)
                out = run_experts(expert_layer, ffn_inputs, topk_weights, topk_ids)
                chosen[branch] += int((topk_ids >= 0).sum())
            states[branch][rows] = (attended + out).view(hidden_states[rows].shape).cpu()
    tokens = hidden_states.shape[0] * hidden_states.shape[1]
    return states, {branch: None if branch[-1] is None else chosen[branch] / tokens for branch in branches}


def _score(
    model: StreamedModel, blocks: Tensor, states: dict[Rules, Tensor], reference: Rules | None
) -> dict[Rules, tuple[float, float | None, float | None]]:
    """Per variant: mean negative log-likelihood in nats, agreement with the reference, KL from it."""
    sums = {variant: torch.zeros(3, dtype=torch.float64) for variant in states}

    def log_probs(variant: Rules, row: slice) -> Tensor:
        hidden_states = states[variant][row, :-1].flatten(0, 1).to(model.device)
        return model.ends.logits(hidden_states).float().log_softmax(dim=-1)

    for index in range(len(blocks)):  # one sequence at a time: logits are wide
        row = slice(index, index + 1)
        targets = blocks[row, 1:].flatten().to(model.device)
        base = None if reference is None else log_probs(reference, row)
        for variant in states:
            logp = base if base is not None and variant == reference else log_probs(variant, row)
            sums[variant][0] += F.nll_loss(logp, targets, reduction="sum").item()
            if base is not None:
                sums[variant][1] += (logp.argmax(dim=-1) == base.argmax(dim=-1)).sum().item()
                sums[variant][2] += F.kl_div(logp, base, reduction="sum", log_target=True).item()
    means = {variant: (total / num_scored(blocks)).tolist() for variant, total in sums.items()}
    if not all(loss < MAX_LOSS for loss, _, _ in means.values()):  # also false for NaN
        raise ValueError(f"{model.directory}: the model's loss is not finite; are its weights sound?")
    return {
        variant: (loss, None, None) if reference is None else (loss, agreement, max(kl, 0.0))
        for variant, (loss, agreement, kl) in means.items()
    }
