"""Estimates the damage to the model if one layer alone runs under another rule, for all layers and rules at once.

The damage is the KL divergence of the next-token distribution from the dense model's, in nats per token. Let e be the change
of a layer's output under a rule, and F the Fisher matrix of the next tokens with respect to that output. To second order, the
damage is e F e / 2. F is the mean of g g, where g is the gradient of the log-probability of a next token that is drawn from the
model itself. One forward pass, and one backward pass per sample, give g for every layer. In addition, each rule needs one run
of its layer. Products between different positions of a text are left out, because their mean is small and they are most of the
noise.

The larger the damage, the more the second order underestimates it. So if the damage of a layer is large, its most damaging rule
is measured. This gives a factor f between measurement and estimate. Rules with a smaller estimate are corrected by less, by
f ** (their estimate / the largest one).

The passes are those of `backward`. Legend: B sequences, S positions, T = B * S tokens, D hidden_size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ladimo.convert.evaluation.measure import measure
from ladimo.convert.evaluation.variants import Rules, distinct_experts
from ladimo.convert.ffn.expert_layer import route, run_experts
from ladimo.convert.policies.backward import Chunk, Visit, run_backward
from ladimo.convert.streamed_model import ExpertSource, StreamedModel
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule

SAMPLES = 2
LARGE = 0.01  # nats; where the most damaging rule of a layer is estimated above this, it is measured


@dataclass(frozen=True, slots=True)
class RuleDamage:
    """The damage of one layer under one rule, with all other layers dense. kl: nats per token. distinct_experts: the number of
    different experts in a batch of 32 random tokens. measured: whether this rule was measured to correct the layer's
    estimates."""

    kl: float
    distinct_experts: float
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """A second-order estimate. kl: nats per token of each sequence, [B]. distinct_experts: as in `RuleDamage`."""

    kl: Tensor
    distinct_experts: float


Estimates = dict[int, dict[LayerRule, Estimate]]


def rule_damages(
    dense: StreamedModel,
    experts: ExpertSource,
    rules: Mapping[int, Sequence[LayerRule]],
    blocks: Tensor,
    samples: int = SAMPLES,
    large: float = LARGE,
) -> dict[int, dict[LayerRule, RuleDamage]]:
    """The damages by layer and rule, on token blocks [B, S]. Measurements use half of the blocks. large: as `LARGE`; 0 corrects
    every layer, infinity none."""
    estimates = estimate_damages(dense, experts, rules, blocks, samples)
    checked = blocks[: -(-len(blocks) // 2)]
    worst: dict[tuple[int, bool], LayerRule] = {}  # fixed and routed experts each have a factor
    for index, own in estimates.items():
        for routed in (False, True):
            kind = [rule for rule in own if is_routed(rule) == routed]
            if kind and own[most := max(kind, key=lambda rule: _mean(own[rule].kl))].kl.mean() > large:
                worst[index, routed] = most
    factors = _factors(dense, experts, estimates, worst, checked)
    damages: dict[int, dict[LayerRule, RuleDamage]] = {}
    for index, own in estimates.items():
        damages[index] = {}
        for rule, estimate in own.items():
            key, kl = (index, is_routed(rule)), _mean(estimate.kl)
            if key in worst:
                kl *= factors[key] ** (kl / _mean(own[worst[key]].kl))
            damages[index][rule] = RuleDamage(kl, estimate.distinct_experts, worst.get(key) == rule)
    return damages


def _factors(
    dense: StreamedModel,
    experts: ExpertSource,
    estimates: Estimates,
    worst: Mapping[tuple[int, bool], LayerRule],
    blocks: Tensor,
) -> dict[tuple[int, bool], float]:
    """Measured damage divided by estimated damage, for the rules in `worst`. blocks [B, S]: the first of those that the
    estimates used."""
    if not worst:
        return {}
    depth = dense.config.num_hidden_layers
    reference: Rules = (None,) * depth
    alone = {key: tuple(rule if layer == key[0] else None for layer in range(depth)) for key, rule in worst.items()}
    measured = measure(dense, experts, blocks, [reference, *alone.values()], reference)
    factors = {}
    for key, rule in worst.items():
        estimated = _mean(estimates[key[0]][rule].kl[: len(blocks)])
        factors[key] = max(measured[alone[key]].kl or 0.0, 1e-12) / estimated
    return factors


def is_routed(rule: LayerRule) -> bool:
    """Whether the token decides which experts run."""
    return rule.experts is None or rule.top_k < len(rule.experts)


def estimate_damages(
    dense: StreamedModel, experts: ExpertSource, rules: Mapping[int, Sequence[LayerRule]], blocks: Tensor, samples: int
) -> Estimates:
    """To second order, by layer and rule. One layer is in memory at a time, and its inputs are kept for all of them."""
    sums: dict[int, dict[LayerRule, Tensor]] = {}
    ran: dict[int, dict[LayerRule, list[Tensor]]] = {}

    def begin(index: int) -> Visit:
        wanted = rules.get(index, ())
        expert_layer = experts(index) if wanted else None
        sums[index] = {rule: torch.zeros(len(blocks), dtype=torch.float64) for rule in wanted}
        ran[index] = {rule: [] for rule in wanted}

        def visit(chunk: Chunk) -> None:
            for rule in wanted:
                assert expert_layer is not None
                error, ids = _change(expert_layer, chunk.ffn_inputs, chunk.ffn_outputs, rule)
                sums[index][rule][chunk.rows] = chunk.products(error)
                ran[index][rule].append(ids.to("cpu", torch.int16))

        return visit

    run_backward(dense, blocks, samples, min(rules, default=dense.config.num_hidden_layers), begin)
    scored = samples * (blocks.shape[1] - 1)  # per sequence
    return {
        index: {
            rule: Estimate((0.5 * total / scored).clamp(min=1e-12), _distinct(ran[index][rule])) for rule, total in own.items()
        }
        for index, own in sums.items()
        if index in rules
    }


@torch.no_grad()
def _change(layer: ExpertLayer, inputs: Tensor, outputs: Tensor, rule: LayerRule) -> tuple[Tensor, Tensor]:
    """The change of the FFN's outputs [T, D] under a rule, and the ids of the experts that run."""
    _, topk_weights, topk_ids = route(layer, inputs, rule)
    return run_experts(layer, inputs, topk_weights, topk_ids) - outputs, topk_ids


def _distinct(ids: Sequence[Tensor]) -> float:
    every = torch.cat(list(ids)).long()
    return distinct_experts(every, (every >= 0).sum(dim=1), int(every.max()) + 1)


def _mean(values: Tensor) -> float:
    return values.mean().item()
