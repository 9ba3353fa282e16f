"""How much it damages the model when one layer alone runs under another rule: estimated for all layers and rules at once.

Damage is the KL divergence of the next-token distribution from the dense model's, in nats per token. Let e be what a rule
changes in a layer's output, and F the Fisher matrix of the next tokens with respect to that output. To second order the damage
is e F e / 2. F is the mean of g g over gradients g of the log-probability of next tokens drawn from the model itself. One pass
forward and one back per sample give g for every layer, and each rule costs only its own run of the layer. Products between
different positions of a text are left out: their mean is small, and they are most of the noise.

The larger the damage, the more the second order falls short. So the most damaging rule of each layer is measured, too. What it
falls short by there is a factor f. A rule with a smaller estimate is corrected by less, by f ** (its estimate / the largest).

Legend: B sequences, S positions, T = B * S tokens, D hidden_size, V vocabulary, M samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ladimo.convert.evaluation.measure import measure
from ladimo.convert.evaluation.variants import Rules, distinct_experts
from ladimo.convert.ffn.expert_layer import route, run_experts
from ladimo.convert.progress import track
from ladimo.convert.streamed_model import ExpertSource, StreamedModel, chunks
from ladimo.model.moe import ExpertLayer
from ladimo.model.transformer import DecoderLayer
from ladimo.policy import LayerRule

SAMPLES = 2
LARGE = 0.01  # nats; where the most damaging rule of a layer is estimated above this, it is measured
CHUNK_TOKENS = 2048  # that pass through a layer at once, with all that a gradient needs


@dataclass(frozen=True, slots=True)
class RuleDamage:
    """One layer under one rule, the others dense. kl: nats per token. distinct_experts: different ones that a batch of 32
    tokens drawn at random runs. measured: whether the rule was measured, too, to correct the layer's estimates."""

    kl: float
    distinct_experts: float
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """To second order. kl: nats per token of each sequence, [B]. distinct_experts: as in `RuleDamage`."""

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
    """By layer and rule, on token blocks [B, S]. Measurements are made on half of the blocks. large: 0 corrects every layer,
    infinity none."""
    estimates = estimate_damages(dense, experts, rules, blocks, samples)
    checked = blocks[: -(-len(blocks) // 2)]
    worst: dict[tuple[int, bool], LayerRule] = {}  # fixed and routed experts have each their own factor
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
    """Measured over estimated damage of each layer's most damaging rule. blocks: the first [B, S] of those estimated on."""
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
    inputs = layer_inputs(dense, blocks)
    gradients = output_gradients(dense, inputs.pop(), samples)
    sums: dict[int, dict[LayerRule, Tensor]] = {}
    ran: dict[int, dict[LayerRule, list[Tensor]]] = {}
    first = min(rules, default=dense.config.num_hidden_layers)
    for index in track(list(reversed(range(first, dense.config.num_hidden_layers))), "layers backward"):
        wanted, hidden_states = rules.get(index, ()), inputs.pop()
        layer, expert_layer = dense.layer(index), experts(index) if wanted else None
        sums[index] = {rule: torch.zeros(len(blocks), dtype=torch.float64) for rule in wanted}
        ran[index] = {rule: [] for rule in wanted}
        for rows in chunks(blocks, CHUNK_TOKENS):
            given = hidden_states[rows].to(dense.device).requires_grad_()
            attended, ffn_inputs = _attend(dense, layer, given)
            outputs = layer.mlp(ffn_inputs)
            back = gradients[:, rows].to(dense.device).flatten(1, 2)  # [M, T, D]
            for rule in wanted:
                assert expert_layer is not None
                error, ids = _change(expert_layer, ffn_inputs.detach(), outputs.detach(), rule)
                products = (back.float() * error.float()).sum(dim=2).double().square().sum(dim=0)  # [T]
                sums[index][rule][rows] = products.view(given.shape[:2]).sum(dim=1).cpu()
                ran[index][rule].append(ids.to("cpu", torch.int16))
            if index > first:
                out = (attended + outputs).view(given.shape)
                for sample in range(samples):
                    (found,) = torch.autograd.grad(
                        out, given, gradients[sample, rows].to(out), retain_graph=sample < samples - 1
                    )
                    gradients[sample, rows] = found.to(gradients)
    scored = samples * (blocks.shape[1] - 1)  # per sequence
    return {
        index: {
            rule: Estimate((0.5 * total / scored).clamp(min=1e-12), _distinct(ran[index][rule])) for rule, total in own.items()
        }
        for index, own in sums.items()
        if index in rules
    }


@torch.no_grad()
def layer_inputs(dense: StreamedModel, blocks: Tensor) -> list[Tensor]:
    """Hidden states [B, S, D] before each layer and after the last, on the host."""
    states = [dense.embed(blocks)]
    for index in track(range(dense.config.num_hidden_layers), "layers forward"):
        layer, after = dense.layer(index), torch.empty_like(states[-1])
        for rows, attended, ffn_inputs in dense.attend(layer, states[-1]):
            after[rows] = (attended + layer.mlp(ffn_inputs)).view(after[rows].shape).cpu()
        states.append(after)
    return states


def output_gradients(dense: StreamedModel, hidden_states: Tensor, samples: int) -> Tensor:
    """Gradients [M, B, S, D] of the log-probability of a drawn next token after every position but the last, with respect to
    the last layer's output [B, S, D]; fp32 on the host."""
    generator = torch.Generator(dense.device).manual_seed(0)
    gradients = torch.zeros(samples, *hidden_states.shape)
    for row, one in enumerate(track(hidden_states, "sequences", len(hidden_states))):
        given = one[:-1].to(dense.device).requires_grad_()
        logits = dense.ends.logits(given).float()
        probabilities = logits.detach().softmax(dim=-1)
        for sample in range(samples):
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            score = -probabilities  # the gradient of log p(drawn) with respect to the logits: one at the drawn token, less p
            score.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=score.dtype))
            (found,) = torch.autograd.grad(logits, given, score, retain_graph=sample < samples - 1)
            gradients[sample, row, :-1] = found.float().cpu()
    return gradients


def _attend(dense: StreamedModel, layer: DecoderLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Whole sequences [B, S, D] on the device, with gradients: states after attention and the FFN's inputs, [T, D]."""
    ((_, attended, ffn_inputs),) = dense.attend(layer, hidden_states)
    return attended, ffn_inputs


@torch.no_grad()
def _change(layer: ExpertLayer, inputs: Tensor, outputs: Tensor, rule: LayerRule) -> tuple[Tensor, Tensor]:
    """What a rule changes in the FFN's outputs [T, D], and the experts it runs."""
    _, topk_weights, topk_ids = route(layer, inputs, rule)
    return run_experts(layer, inputs, topk_weights, topk_ids) - outputs, topk_ids


def _distinct(ids: Sequence[Tensor]) -> float:
    every = torch.cat(list(ids)).long()
    return distinct_experts(every, (every >= 0).sum(dim=1), int(every.max()) + 1)


def _mean(values: Tensor) -> float:
    return values.mean().item()
