"""Perplexity, cost and agreement with the dense model, for many variants of one model."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.convert.evaluation.variants import Rules, logits, refined_rows, run_variants
from ladimo.convert.progress import track
from ladimo.convert.streamed_model import ExpertSource, StreamedModel
from ladimo.model.config import ModelConfig
from ladimo.policy import RoutingPolicy, token_costs

MAX_LOSS = 700.0  # nats; e^700 is about the largest perplexity that a float can hold


@dataclass(frozen=True, slots=True)
class Measurement:
    """experts_per_token: mean per layer, None where dense. distinct_experts: mean number of different experts that a batch of
    32 tokens drawn at random runs, per layer. refined_rows: mean number of rows of weights that a token refines
    (`inputs.refined_rows`). distinct_refined_rows: how many different ones a batch of 32 such tokens refines.
    next_token_agreement: share of tokens whose most likely next token is the reference's. kl: mean KL divergence from the
    reference's next-token distribution, in nats. Both are None without a reference."""

    perplexity: float
    experts_per_token: tuple[float | None, ...]
    distinct_experts: tuple[float | None, ...]
    refined_rows: float
    distinct_refined_rows: float
    next_token_agreement: float | None
    kl: float | None


def measure(
    model: StreamedModel,
    experts: ExpertSource | None,
    blocks: Tensor,
    variants: Iterable[Rules],
    reference: Rules | None = None,
    dense: StreamedModel | None = None,
) -> dict[Rules, Measurement]:
    """Run token blocks [B, S] through every variant.

    experts(i): returns layer i's expert layer on the model's device; None: the model's own expert layers are used. reference:
    must be one of the variants. dense: the model of the reference, if it is another one. Raises ValueError if a loss is not
    finite.
    """
    wanted = list(dict.fromkeys(variants))
    assert reference is None or reference in wanted
    elsewhere = {} if dense is None or reference is None else {reference: dense}
    states, ran = run_variants(model, experts, [blocks], [variant for variant in wanted if variant not in elsewhere])
    for variant, other in elsewhere.items():
        more = run_variants(other, None, [blocks], [variant])
        states, ran = states | more[0], ran | more[1]
    models = {variant: elsewhere.get(variant, model) for variant in wanted}
    scores = _score(models, blocks, {variant: states[variant][0] for variant in wanted}, reference)
    of_neuron = model.config.neuron_rows
    return {
        variant: Measurement(
            perplexity=math.exp(scores[variant][0]),
            experts_per_token=tuple(None if layer is None else layer.per_token for layer in ran[variant]),
            distinct_experts=tuple(None if layer is None else layer.distinct for layer in ran[variant]),
            refined_rows=of_neuron * sum(layer.refined for layer in ran[variant] if layer is not None) + scores[variant][3],
            distinct_refined_rows=of_neuron * sum(layer.distinct_refined for layer in ran[variant] if layer is not None)
            + scores[variant][4],
            next_token_agreement=scores[variant][1],
            kl=scores[variant][2],
        )
        for variant in wanted
    }


def figures(policy: RoutingPolicy, measurement: Measurement, config: ModelConfig, dense: float | None) -> dict[str, object]:
    """A policy's entry in the JSON of `ladimo evaluate` and in report.json. dense: the dense source's perplexity."""
    read = policy.bytes_ratio(config, measurement.experts_per_token, measurement.refined_rows)
    return {
        "policy": policy.name,
        "version": policy.version,
        "perplexity": measurement.perplexity,
        "perplexity_ratio": None if dense is None else measurement.perplexity / dense,
        "active_parameters_ratio": config.active_parameters_ratio(measurement.experts_per_token),
        **({} if read is None else {"bytes_ratio": read}),
        **token_costs(config, measurement.experts_per_token, read),
        "batch_bytes_ratio": batch_bytes_ratio(policy, measurement, config),
        "experts_per_token": list(measurement.experts_per_token),
        "next_token_agreement": measurement.next_token_agreement,
        "kl": measurement.kl,
    }


def batch_bytes_ratio(policy: RoutingPolicy, measurement: Measurement, config: ModelConfig) -> float:
    """The weight bytes that a decode step of 32 tokens reads, divided by those of the dense model, output head included. What
    several tokens want is read once."""
    read = policy.bytes_ratio(config, measurement.distinct_experts, measurement.distinct_refined_rows)
    return config.operations_ratio(measurement.distinct_experts) if read is None else read


def num_scored(blocks: Tensor) -> int:
    """The number of tokens that are scored in these blocks."""
    return blocks[:, 1:].numel()


def _score(
    models: Mapping[Rules, StreamedModel], blocks: Tensor, states: dict[Rules, Tensor], reference: Rules | None
) -> dict[Rules, tuple[float, float | None, float | None, float, float]]:
    """Per variant, of its model: mean negative log-likelihood in nats, agreement with the reference, KL from it, refined words
    per token, and different ones per batch of 32 tokens."""
    sums = {variant: torch.zeros(5, dtype=torch.float64) for variant in states}
    device = next(iter(models.values())).device

    def log_probs(variant: Rules, row: slice) -> Tensor:
        model = models[variant]
        hidden_states = states[variant][row, :-1].flatten(0, 1).to(model.device)
        scores, words = logits(model, variant, hidden_states)
        if words is not None:
            sums[variant][3:] += len(words) * refined_rows(words)
        return scores.float().log_softmax(dim=-1)

    for index in track(range(len(blocks)), "sequences scored"):  # one at a time, because logits take much memory
        row = slice(index, index + 1)
        targets = blocks[row, 1:].flatten().to(device)
        base = None if reference is None else log_probs(reference, row)
        for variant in track(list(states), "variants"):
            logp = base if base is not None and variant == reference else log_probs(variant, row)
            sums[variant][0] += F.nll_loss(logp, targets, reduction="sum").item()
            if base is not None:
                sums[variant][1] += (logp.argmax(dim=-1) == base.argmax(dim=-1)).sum().item()
                sums[variant][2] += F.kl_div(logp, base, reduction="sum", log_target=True).item()
    means = {variant: (total / num_scored(blocks)).tolist() for variant, total in sums.items()}
    if not all(loss < MAX_LOSS for loss, *_ in means.values()):  # also false for NaN
        raise ValueError(f"{next(iter(models.values())).directory}: the model's loss is not finite; are its weights sound?")
    return {
        variant: (loss, *((None, None) if reference is None else (agreement, max(kl, 0.0))), words, distinct)
        for variant, (loss, agreement, kl, words, distinct) in means.items()
    }
