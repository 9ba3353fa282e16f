"""Changes to logits before the draw: penalties, bias, minimum length, grammars. Legend: R rows, V vocabulary."""

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from server.engine.request import SamplingParams, Sequence


def adjusts(sequence: Sequence) -> bool:
    """Whether the sequence's logits are changed before its next token is drawn."""
    params = sequence.request.sampling
    too_short = len(sequence.output_ids) < params.min_tokens
    return _penalises(params) or bool(params.logit_bias) or params.constraint is not None or too_short


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class _SeenTokens:
    """The distinct tokens of a prompt and its answer (`ids`), and how often each is in the answer (`counts`). On the device."""

    def __init__(self, prompt_ids: Iterable[int], output_ids: Iterable[int], device: torch.device) -> None:
        self._place = {token_id: place for place, token_id in enumerate(dict.fromkeys(prompt_ids))}
        self.ids = torch.tensor(list(self._place), dtype=torch.int64, device=device)
        self.counts = torch.zeros(len(self.ids), device=device)
        for token_id in output_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self.ids):
            self.ids = torch.cat((self.ids, self.ids.new_full((1,), token_id)))
            self.counts = torch.cat((self.counts, self.counts.new_zeros(1)))
        self.counts[place] += 1


class LogitAdjuster:
    """Applies penalties, bias, minimum length and grammars. Its memory of a sequence is freed with the sequence."""

    def __init__(self, eos_token_ids: frozenset[int], device: torch.device) -> None:
        self._eos_token_ids, self._device = eos_token_ids, device
        self._seen: WeakKeyDictionary[Sequence, _SeenTokens] = WeakKeyDictionary()

    def adjust(self, logits: Tensor, sequences: Rows[Sequence]) -> None:
        """Change the logits [R, V] float32 in place, one row per sequence."""
        assert logits.dtype == torch.float32
        for row, sequence in zip(logits, sequences, strict=True):
            params = sequence.request.sampling
            if _penalises(params):
                self._penalise(row, sequence)
            if params.logit_bias:
                ids, biases = zip(*params.logit_bias, strict=True)
                row[list(ids)] += torch.tensor(biases, device=self._device)
            if params.constraint is not None:
                allowed = torch.from_numpy(params.constraint.allowed_tokens()).to(self._device)
                row.masked_fill_(~allowed, -torch.inf)
            if len(sequence.output_ids) < params.min_tokens:
                self._forbid_the_end(row, params)

    def drawn(self, sequence: Sequence, token_id: int) -> None:
        """Take note of a token that was drawn for the sequence."""
        if sequence.request.sampling.constraint is not None:
            sequence.request.sampling.constraint.advance(token_id)
        if sequence in self._seen:
            self._seen[sequence].add(token_id)

    def _penalise(self, row: Tensor, sequence: Sequence) -> None:
        """Apply the three penalties to one row [V] in place, as vLLM does.

        The repetition penalty divides the positive logits of seen tokens and multiplies the negative ones. Then the presence
        and frequency penalties are subtracted.
        """
        if sequence not in self._seen:
            self._seen[sequence] = _SeenTokens(sequence.request.prompt_ids, sequence.output_ids, self._device)
        seen, params = self._seen[sequence], sequence.request.sampling
        logits = row[seen.ids]
        repeated = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        row[seen.ids] = repeated - params.frequency_penalty * seen.counts - params.presence_penalty * (seen.counts > 0)

    def _forbid_the_end(self, row: Tensor, params: SamplingParams) -> None:
        ends = sorted(params.stop_token_ids if params.ignore_eos else params.stop_token_ids | self._eos_token_ids)
        if not ends:
            return
        before = row[ends]
        row[ends] = -torch.inf
        # If nothing else may follow, because a grammar's text is complete, the answer may end early after all.
        row[ends] = torch.where(row.max() > -torch.inf, -torch.inf, before)
