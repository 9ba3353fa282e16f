"""Choosing the next token of every row at once. Legend: R rows, V vocabulary."""

import hashlib
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from server.engine.request import SamplingParams, Sequence
from server.engine.transfers import to_device


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """Per row: temperature (0 = greedy), top_p, top_k (0 = no limit), min_p, and one uniform number in [0, 1)."""

    temperature: Tensor  # [R] float32
    top_p: Tensor  # [R] float32
    top_k: Tensor  # [R] int64
    min_p: Tensor  # [R] float32
    uniform: Tensor  # [R] float32


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but seed and position: what is drawn never depends on the batch."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def make_sampling_inputs(sequences: Rows[Sequence], device: torch.device) -> SamplingInputs | None:
    """The rows' parameters as tensors; None when every row is greedy, which needs no sorting."""
    params = [sequence.request.sampling for sequence in sequences]
    if all(p.temperature == 0 for p in params):
        return None

    def column(values: list[float]) -> Tensor:
        return to_device(values, torch.float32, device)

    return SamplingInputs(
        temperature=column([p.temperature for p in params]),
        top_p=column([p.top_p for p in params]),
        top_k=to_device([p.top_k for p in params], torch.int64, device),
        min_p=column([p.min_p for p in params]),
        uniform=column([uniform(s.seed, s.num_tokens) for s in sequences]),
    )


def sample(logits: Tensor, inputs: SamplingInputs | None) -> Tensor:
    """Token ids [R] from logits [R, V]: temperature, then top-k, min-p and top-p, then inversion of the cumulative
    distribution."""
    greedy = logits.argmax(dim=-1)
    if inputs is None:
        return greedy
    scaled = logits.float() / inputs.temperature.clamp(min=1e-5).unsqueeze(-1)
    probabilities, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    top_k = torch.where(inputs.top_k > 0, inputs.top_k, logits.shape[-1])
    likely = probabilities >= inputs.min_p.unsqueeze(-1) * probabilities[:, :1]
    probabilities = probabilities * (likely & (rank < top_k.unsqueeze(-1)))
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities * ((before < inputs.top_p.unsqueeze(-1)) | (rank == 0))
    cumulative = probabilities.cumsum(dim=-1)
    threshold = inputs.uniform.unsqueeze(-1) * cumulative[:, -1:]
    # First place whose cumulative probability exceeds the threshold; rounding can never reach a dropped place.
    place = (cumulative <= threshold).sum(dim=-1, keepdim=True)
    last_kept = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    drawn = order.gather(-1, torch.minimum(place, last_kept)).squeeze(-1)
    return torch.where(inputs.temperature == 0, greedy, drawn)


class LogitAdjuster:
    """What changes logits before the draw: penalties, bias, the least number of tokens, grammars. Rows without are untouched.

    Token counts of penalised sequences stay on the device and die with their sequence.
    """

    def __init__(self, vocab_size: int, eos_token_ids: frozenset[int], device: torch.device) -> None:
        self._vocab_size, self._eos_token_ids, self._device = vocab_size, eos_token_ids, device
        self._counts: WeakKeyDictionary[Sequence, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def adjust(self, logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
        """Logits [R, V] -> the logits to draw from, [R, V]; the input is not written to."""
        if not any(adjusts(sequence) for sequence in sequences):
            return logits
        logits = logits.float().clone()
        for row, sequence in enumerate(sequences):
            params = sequence.request.sampling
            if _penalises(params):
                self._penalise(logits[row], sequence)
            if params.logit_bias:
                ids, biases = zip(*params.logit_bias, strict=True)
                logits[row, list(ids)] += torch.tensor(biases, device=self._device)
            if params.constraint is not None:
                allowed = torch.from_numpy(params.constraint.allowed_tokens()).to(self._device)
                logits[row].masked_fill_(~allowed, -torch.inf)
            if len(sequence.output_ids) < params.min_tokens:
                early = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | self._eos_token_ids
                longer = logits[row].clone()
                longer[sorted(early)] = -torch.inf
                # Where nothing else may follow (a grammar's text is complete), ending early is the lesser evil.
                logits[row] = torch.where(longer.isfinite().any(), longer, logits[row])
        return logits

    def drawn(self, sequence: Sequence, token_id: int) -> None:
        """The token was drawn for the sequence."""
        if sequence.request.sampling.constraint is not None:
            sequence.request.sampling.constraint.advance(token_id)
        if sequence in self._counts:
            self._counts[sequence][1][token_id] += 1

    def _penalise(self, logits: Tensor, sequence: Sequence) -> None:
        """As vLLM: repetition divides positive and multiplies negative logits of seen tokens, then presence and frequency are
        subtracted. In place on one row [V]."""
        if sequence not in self._counts:
            self._counts[sequence] = (self._histogram(sequence.request.prompt_ids) > 0, self._histogram(sequence.output_ids))
        in_prompt, in_output = self._counts[sequence]
        params = sequence.request.sampling
        seen = in_prompt | (in_output > 0)
        repeated = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits.copy_(torch.where(seen, repeated, logits))
        logits -= params.frequency_penalty * in_output + params.presence_penalty * (in_output > 0)

    def _histogram(self, token_ids: Rows[int]) -> Tensor:
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        return torch.zeros(self._vocab_size, device=self._device).index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def adjusts(sequence: Sequence) -> bool:
    """Whether the sequence's logits are changed before its next token is drawn."""
    params = sequence.request.sampling
    too_short = len(sequence.output_ids) < params.min_tokens
    return _penalises(params) or bool(params.logit_bias) or params.constraint is not None or too_short
