"""Perplexity, cost, agreement with the dense model and likelihoods of given texts, for many variants of one model in one
streaming pass over its layers.

A variant is one choice per layer: None for the dense FFN, a rule for the expert layer under that rule. Variants that agree up
to a layer share their hidden states up to it. Legend: B sequences, S positions, D hidden_size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ladimo.convert.choose_policy import Rules
from ladimo.convert.distill import route, run_experts
from ladimo.convert.profile import distinct_experts
from ladimo.convert.teacher import CHUNK_TOKENS, StreamedModel
from ladimo.model.config import ModelConfig
from ladimo.model.moe import ExpertLayer
from ladimo.model.transformer import DecoderLayer
from ladimo.policy import RoutingPolicy

MAX_LOSS = 700.0  # nats; a perplexity above e^700 is no number any more
LOGIT_ROWS = 1024  # rows of logits [., V] held at once
PASS_BYTES = 2**31  # hidden states on the host in one pass over the layers, all variants together
ExpertSource = Callable[[int], ExpertLayer]


@dataclass(frozen=True, slots=True)
class Measurement:
    """experts_per_token: mean per layer, None where dense; distinct_experts: different ones that a batch of 32 tokens drawn at
    random runs, likewise. next_token_agreement: share of tokens whose most likely next token
    is the reference's. kl: mean KL divergence from the reference's next-token distribution, in nats; both None without one."""

    perplexity: float
    experts_per_token: tuple[float | None, ...]
    distinct_experts: tuple[float | None, ...]
    next_token_agreement: float | None
    kl: float | None


@dataclass(frozen=True, slots=True)
class Ran:
    """Of one expert layer: experts per token, and different ones per batch of 32 tokens, both means."""

    per_token: float
    distinct: float


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
    states, ran = run_variants(model, experts, [blocks], wanted)
    scores = _score(model, blocks, {variant: batches[0] for variant, batches in states.items()}, reference)
    return {
        variant: Measurement(
            perplexity=math.exp(scores[variant][0]),
            experts_per_token=tuple(None if layer is None else layer.per_token for layer in ran[variant]),
            distinct_experts=tuple(None if layer is None else layer.distinct for layer in ran[variant]),
            next_token_agreement=scores[variant][1],
            kl=scores[variant][2],
        )
        for variant in wanted
    }


@dataclass(frozen=True, slots=True)
class Continuation:
    """Token ids of which those from place `start` on are scored, each given all before it; `start` is at least 1."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Likelihood:
    """log_prob: of the whole continuation, in nats. greedy: whether each of its tokens is the most likely one."""

    log_prob: float
    greedy: bool


def likelihoods(
    model: StreamedModel, experts: ExpertSource | None, continuations: Sequence[Continuation], variants: Iterable[Rules]
) -> dict[Rules, list[Likelihood]]:
    """Per variant the likelihood of every continuation, in their order; `experts` as in `measure`.

    Sequences of like length share a batch, padded on the right, where causal attention does not look. Equal inputs (one-token
    answers to one question) are run once.
    """
    wanted = list(dict.fromkeys(variants))
    asked: dict[tuple[int, ...], list[int]] = {}
    for number, continuation in enumerate(continuations):
        assert 1 <= continuation.start < len(continuation.ids)
        asked.setdefault(continuation.ids[:-1], []).append(number)
    bytes_per_token = len(wanted) * model.config.hidden_size * model.dtype.itemsize
    found: dict[Rules, dict[int, Likelihood]] = {variant: {} for variant in wanted}
    for batches in _passes(sorted(asked, key=len), PASS_BYTES // bytes_per_token):
        padded = [_pad(batch) for batch in batches]
        states, _ = run_variants(model, experts, padded, wanted)
        for variant in wanted:
            for batch, hidden_states in zip(batches, states.pop(variant), strict=True):
                places = [(row, number) for row, ids in enumerate(batch) for number in asked[ids]]
                scored = _score_rows(model, hidden_states, [(row, continuations[number]) for row, number in places])
                found[variant] |= {number: value for (_, number), value in zip(places, scored, strict=True)}
    return {variant: [values[number] for number in range(len(continuations))] for variant, values in found.items()}


def run_variants(
    model: StreamedModel, experts: ExpertSource | None, batches: Sequence[Tensor], wanted: Sequence[Rules]
) -> tuple[dict[Rules, list[Tensor]], dict[Rules, tuple["Ran | None", ...]]]:
    """Batches of token ids [B, S] through all layers, one of which is in memory at a time: per variant the hidden states
    [B, S, D] of every batch, and what ran in every layer, None where dense."""
    states: dict[Rules, list[Tensor]] = {(): [model.embed(batch) for batch in batches]}
    per_layer: dict[Rules, Ran | None] = {}
    for index in tqdm(range(model.config.num_hidden_layers), desc="  layers", leave=False, disable=None):
        layer = model.layer(index)
        expert_layer: ExpertLayer | None = None
        if any(variant[index] is not None for variant in wanted):
            expert_layer = experts(index) if experts is not None else _own_experts(layer)
        advanced: dict[Rules, list[Tensor]] = {}
        for prefix in list(states):
            branches = list(dict.fromkeys(variant[: index + 1] for variant in wanted if variant[:index] == prefix))
            new_states, counts = _advance(model, layer, expert_layer, states.pop(prefix), branches)
            advanced |= new_states
            per_layer |= counts
        states = advanced
    return states, {variant: tuple(per_layer[variant[: index + 1]] for index in range(len(variant))) for variant in wanted}


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
    model: StreamedModel,
    layer: DecoderLayer,
    expert_layer: ExpertLayer | None,
    batches: Sequence[Tensor],
    branches: list[Rules],
) -> tuple[dict[Rules, list[Tensor]], dict[Rules, Ran | None]]:
    """Hidden states [B, S, D] of every batch through one layer, once per branch: the states after it and what ran."""
    states = {branch: [torch.empty_like(batch) for batch in batches] for branch in branches}
    ids: dict[Rules, list[Tensor]] = {branch: [] for branch in branches}
    for number, hidden_states in enumerate(batches):
        for rows, attended, ffn_inputs in model.attend(layer, hidden_states):
            for branch in branches:
                rule = branch[-1]
                if rule is None:
                    out = layer.mlp(ffn_inputs)
                else:
                    assert expert_layer is not None
                    _, topk_weights, topk_ids = route(expert_layer, ffn_inputs, rule)
                    out = run_experts(expert_layer, ffn_inputs, topk_weights, topk_ids)
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
            ran[branch] = Ran(needed.float().mean().item(), distinct)
    return states, ran


def _passes(inputs: Sequence[tuple[int, ...]], max_tokens: int) -> Iterator[list[list[tuple[int, ...]]]]:
    """Sequences sorted by length, cut into batches of about CHUNK_TOKENS padded tokens and these into passes of max_tokens."""
    batches: list[list[tuple[int, ...]]] = []
    batch: list[tuple[int, ...]] = []
    tokens = 0
    for ids in inputs:
        if batch and (len(batch) + 1) * len(ids) > CHUNK_TOKENS:
            batches.append(batch)
            tokens += len(batch) * len(batch[-1])
            batch = []
            if tokens >= max_tokens:
                yield batches
                batches, tokens = [], 0
        batch.append(ids)
    if batch:
        yield [*batches, batch]


def _pad(batch: Sequence[tuple[int, ...]]) -> Tensor:
    """Sequences sorted by length -> [B, S], the places behind a sequence's end filled with token 0."""
    longest = len(batch[-1])
    return torch.tensor([ids + (0,) * (longest - len(ids)) for ids in batch])


def _score_rows(
    model: StreamedModel, hidden_states: Tensor, places: Sequence[tuple[int, Continuation]]
) -> Iterator[Likelihood]:
    """Hidden states [B, S, D] of the inputs, and which row of them each continuation is read from."""
    rows = [hidden_states[row, one.start - 1 : len(one.ids) - 1] for row, one in places]
    targets = torch.tensor([token for _, one in places for token in one.ids[one.start :]])
    log_probs, greedy = [], []
    for part, target in zip(torch.cat(rows).split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logp = model.ends.logits(part.to(model.device)).float().log_softmax(dim=-1).cpu()
        log_probs.append(logp.gather(1, target[:, None])[:, 0])
        greedy.append(logp.argmax(dim=-1) == target)
    lengths = [len(row) for row in rows]
    pairs = zip(torch.cat(log_probs).double().split(lengths), torch.cat(greedy).split(lengths), strict=True)
    for log_prob, hits in pairs:
        yield Likelihood(log_prob.sum().item(), bool(hits.all()))


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
