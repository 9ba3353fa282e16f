"""Likelihoods of given continuations, for many variants of one model in one pass over its layers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ladimo.convert.evaluation.variants import PASS_BYTES, Rules, logits, run_variants
from ladimo.convert.streamed_model import CHUNK_TOKENS, ExpertSource, StreamedModel

LOGIT_ROWS = 1024  # rows of logits [., V] in memory at once


@dataclass(frozen=True, slots=True)
class Continuation:
    """Token ids. Those from position `start` on are scored, each given all tokens before it. `start` is at least 1."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Likelihood:
    """log_prob: that of the whole continuation, in nats. greedy: whether each of its tokens is the most likely one."""

    log_prob: float
    greedy: bool


def likelihoods(
    model: StreamedModel,
    experts: ExpertSource | None,
    continuations: Sequence[Continuation],
    variants: Iterable[Rules],
    chunk_tokens: int = CHUNK_TOKENS,
    pass_bytes: int = PASS_BYTES,
    logit_rows: int = LOGIT_ROWS,
) -> dict[Rules, list[Likelihood]]:
    """For each variant, the likelihood of every continuation, in their order. `experts`: see `measure`.

    Sequences of similar length share a batch of about `chunk_tokens`. They are padded on the right, which has no effect under
    causal attention. Equal inputs, such as those of one-token answers to one question, run once. The hidden states of one pass
    over the layers take about `pass_bytes`. `logit_rows` rows of logits are in memory at once. The result does not depend on
    these three numbers.
    """
    wanted = list(dict.fromkeys(variants))
    asked: dict[tuple[int, ...], list[int]] = {}
    for number, continuation in enumerate(continuations):
        assert 1 <= continuation.start < len(continuation.ids)
        asked.setdefault(continuation.ids[:-1], []).append(number)
    bytes_per_token = len(wanted) * model.config.hidden_size * model.dtype.itemsize
    found: dict[Rules, dict[int, Likelihood]] = {variant: {} for variant in wanted}
    for batches in _passes(sorted(asked, key=len), pass_bytes // bytes_per_token, chunk_tokens):
        padded = [_pad(batch) for batch in batches]
        states, _ = run_variants(model, experts, padded, wanted)
        for variant in wanted:
            for batch, hidden_states in zip(batches, states.pop(variant), strict=True):
                places = [(row, number) for row, ids in enumerate(batch) for number in asked[ids]]
                own = [(row, continuations[number]) for row, number in places]
                scored = _score_rows(model, variant, hidden_states, own, logit_rows)
                found[variant] |= {number: value for (_, number), value in zip(places, scored, strict=True)}
    return {variant: [values[number] for number in range(len(continuations))] for variant, values in found.items()}


def _passes(inputs: Sequence[tuple[int, ...]], max_tokens: int, chunk_tokens: int) -> Iterator[list[list[tuple[int, ...]]]]:
    """Divide sequences, which are sorted by length, into batches of about chunk_tokens padded tokens, and the batches into
    passes of about max_tokens."""
    batches: list[list[tuple[int, ...]]] = []
    batch: list[tuple[int, ...]] = []
    tokens = 0
    for ids in inputs:
        if batch and (len(batch) + 1) * len(ids) > chunk_tokens:
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
    """Sequences, sorted by length -> [B, S]. Shorter sequences are filled with token 0."""
    longest = len(batch[-1])
    return torch.tensor([ids + (0,) * (longest - len(ids)) for ids in batch])


def _score_rows(
    model: StreamedModel, variant: Rules, hidden_states: Tensor, places: Sequence[tuple[int, Continuation]], logit_rows: int
) -> Iterator[Likelihood]:
    """Score continuations. hidden_states: [B, S, D], those of the inputs. places: for each continuation, its row of these."""
    rows = [hidden_states[row, one.start - 1 : len(one.ids) - 1] for row, one in places]
    targets = torch.tensor([token for _, one in places for token in one.ids[one.start :]])
    log_probs, greedy = [], []
    for part, target in zip(torch.cat(rows).split(logit_rows), targets.split(logit_rows), strict=True):
        scores, _ = logits(model, variant, part.to(model.device))
        logp = scores.float().log_softmax(dim=-1).cpu()
        log_probs.append(logp.gather(1, target[:, None])[:, 0])
        greedy.append(logp.argmax(dim=-1) == target)
    lengths = [len(row) for row in rows]
    pairs = zip(torch.cat(log_probs).double().split(lengths), torch.cat(greedy).split(lengths), strict=True)
    for log_prob, hits in pairs:
        yield Likelihood(log_prob.sum().item(), bool(hits.all()))
