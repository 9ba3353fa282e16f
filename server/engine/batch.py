"""The work of one step: a `Batch` of sequences for the scheduler, and the same as tensors for the model."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ladimo.model.inputs import PrefillSegment, StepInputs
from ladimo.policy import RoutingPolicy
from server.engine.request import Sequence
from server.engine.sampling.logit_adjuster import adjusts
from server.engine.sampling.sampler import cuts
from server.engine.transfers import to_device

PolicyRun = tuple[RoutingPolicy, int]  # a policy, and the number of consecutive tokens of a sequence that run under it


@dataclass(slots=True)
class Batch:
    """The sequences of one step. `decode`: sequences with one token left to compute. `prefill`: pairs of a sequence and the
    number of its next tokens that this step computes. Results come back in this order, decode first.

    A batch with `previous` runs ahead: it follows a step whose tokens the host does not know yet. It has decoding sequences
    only. Each of them will have one token more than it has now. `previous[i]` is the row of the earlier step that draws the
    missing token of `decode[i]`.
    """

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)
    previous: list[int] | None = None

    @property
    def scheduled(self) -> list[tuple[Sequence, int]]:
        """All sequences with the number of their tokens in this step, decode first."""
        return [(sequence, 1) for sequence in self.decode] + self.prefill

    @property
    def num_tokens(self) -> int:
        """The number of tokens that this step computes."""
        return len(self.decode) + sum(count for _, count in self.prefill)

    @property
    def decode_runs(self) -> list[PolicyRun]:
        """The policies of the decoding sequences."""
        ahead = int(self.previous is not None)
        return [run for sequence in self.decode for run in _policy_runs(sequence, sequence.num_computed + ahead, 1)]

    @property
    def prefill_runs(self) -> list[PolicyRun]:
        """The policies of the tokens in `prefill`."""
        return [run for sequence, count in self.prefill for run in _policy_runs(sequence, sequence.num_computed, count)]

    @property
    def drawing(self) -> list[Sequence]:
        """The sequences that get a new token in this step, in batch order."""
        return [sequence for sequence, count in self.scheduled if samples(sequence, count)]

    @property
    def greedy(self) -> bool:
        """Whether every sequence has temperature 0, so that it takes its most likely token."""
        return all(sequence.request.sampling.temperature == 0 for sequence, _ in self.scheduled)

    @property
    def cuts(self) -> bool:
        """Whether any sequence draws under top-k, top-p or min-p."""
        return any(cuts(sequence.request.sampling) for sequence, _ in self.scheduled)


def tokens_by_policy(runs: Iterable[PolicyRun]) -> dict[str, int]:
    """The number of tokens by policy name."""
    tokens: Counter[str] = Counter()
    for policy, count in runs:
        tokens[policy.name] += count
    return dict(tokens)


def _policy_runs(sequence: Sequence, begin: int, count: int) -> list[PolicyRun]:
    return [(sequence.request.policies[phase], run) for phase, run in sequence.phases(begin, begin + count)]


def samples(sequence: Sequence, count: int) -> bool:
    """Whether computing the next `count` tokens of the sequence reaches its end, so that a new token follows."""
    return sequence.num_computed + count == sequence.num_tokens


def num_logits(sequence: Sequence, count: int) -> int:
    """How many of the next `count` tokens need logits. These are always the last ones."""
    if sequence.request.sampling.prompt_logprobs is not None and sequence.num_computed < len(sequence.request.prompt_ids):
        return count
    return int(samples(sequence, count))


def may_run_ahead(sequence: Sequence) -> bool:
    """Whether the sequence's next token can be computed and drawn before the host knows the one before.

    It cannot if the host adjusts the logits (penalties, grammars) or reports more than the token (log-probabilities, traces),
    or if the token may end a phase.
    """
    request, sampling = sequence.request, sequence.request.sampling
    asks_for_more = sampling.logprobs is not None or sampling.prompt_logprobs is not None or request.trace is not None
    return not asks_for_more and not adjusts(sequence) and sequence.in_last_phase


class DecodeRows(NamedTuple):
    """The inputs of the decoding sequences. Each list has one number per sequence."""

    input_ids: list[int]  # zeros if the batch runs ahead, because the tokens are on the device only
    positions: list[int]
    policy_ids: list[int]
    slot_mapping: list[int]
    context_lens: list[int]


def decode_rows(batch: Batch, block_size: int) -> DecodeRows:
    """The inputs of the batch's decoding sequences. `block_size`: tokens per KV cache block."""
    ahead = batch.previous is not None
    positions = [sequence.num_computed + ahead for sequence in batch.decode]
    placed = list(zip(batch.decode, positions, strict=True))
    return DecodeRows(
        input_ids=[0 if ahead else sequence.token_ids(p, p + 1)[0] for sequence, p in placed],
        positions=positions,
        policy_ids=[sequence.rows[sequence.phase(p)] for sequence, p in placed],
        slot_mapping=[sequence.block_table[p // block_size] * block_size + p % block_size for sequence, p in placed],
        context_lens=[p + 1 for p in positions],
    )


def make_step_inputs(batch: Batch, block_size: int, device: torch.device) -> StepInputs:
    """The batch as tensors on `device`: first the decode rows, then the prefill segments. `block_size`: tokens per block."""
    input_ids, positions, policy_ids, slots, context_lens = decode_rows(batch, block_size)
    logit_indices = list(range(len(batch.decode)))
    segments: list[PrefillSegment] = []
    for row, (sequence, count) in enumerate(batch.prefill, start=len(batch.decode)):
        begin, end = sequence.num_computed, sequence.num_computed + count
        segments.append(PrefillSegment(row, len(input_ids), count, end))
        input_ids += sequence.token_ids(begin, end)
        positions += range(begin, end)
        slots += [sequence.block_table[p // block_size] * block_size + p % block_size for p in range(begin, end)]
        for phase, run in sequence.phases(begin, end):
            policy_ids += [sequence.rows[phase]] * run
        context_lens.append(end)
        logit_indices += range(len(input_ids) - num_logits(sequence, count), len(input_ids))
    width = -(-max(context_lens) // block_size)
    tables = [(sequence.block_table + [0] * width)[:width] for sequence, _ in batch.scheduled]

    def tensor(values: list[Any]) -> torch.Tensor:
        return to_device(values, torch.int64, device)

    # One copy for four lists: the call costs more than the data.
    ids, places, policies, slot_mapping = tensor([input_ids, positions, policy_ids, slots]).unbind()
    return StepInputs(
        input_ids=ids,
        positions=places,
        policy_ids=policies,
        slot_mapping=slot_mapping,
        block_table=tensor(tables),
        context_lens=tensor(context_lens),
        num_decode=len(batch.decode),
        prefill=tuple(segments),
        logit_indices=tensor(logit_indices) if segments else None,  # every decode row needs its logits
    )
