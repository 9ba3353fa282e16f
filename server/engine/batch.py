"""One step's work as the scheduler sees it (sequences, integers) and as the model sees it (tensors)."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ladimo.model.inputs import PrefillSegment, StepInputs
from server.engine.request import Sequence
from server.engine.sampling.logit_adjuster import adjusts
from server.engine.sampling.sampler import cuts
from server.engine.transfers import to_device


@dataclass(slots=True)
class Batch:
    """`decode`: sequences of which only the last token is not computed yet. `prefill`: sequences and how many of their next
    tokens this step computes. Results come back in this order, decode first.

    With `previous` the batch runs ahead: it has decoding sequences only, and follows a step whose tokens the host does not know
    yet. The sequences are then one token further than they say, and previous[i] is the row of that step that draws decode[i]'s
    token.
    """

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)
    previous: list[int] | None = None

    @property
    def scheduled(self) -> list[tuple[Sequence, int]]:
        return [(sequence, 1) for sequence in self.decode] + self.prefill

    @property
    def num_tokens(self) -> int:
        return len(self.decode) + sum(count for _, count in self.prefill)

    @property
    def drawing(self) -> list[Sequence]:
        """The sequences that get a token, in order."""
        return [sequence for sequence, count in self.scheduled if samples(sequence, count)]

    @property
    def greedy(self) -> bool:
        """Whether every sequence takes its likeliest token."""
        return all(sequence.request.sampling.temperature == 0 for sequence, _ in self.scheduled)

    @property
    def cuts(self) -> bool:
        """Whether a sequence draws under a limit: top-k, top-p or min-p."""
        return any(cuts(sequence.request.sampling) for sequence, _ in self.scheduled)


def samples(sequence: Sequence, count: int) -> bool:
    """Whether computing the next `count` tokens of the sequence reaches its end, so that a new token follows."""
    return sequence.num_computed + count == sequence.num_tokens


def num_logits(sequence: Sequence, count: int) -> int:
    """Of the next `count` tokens of the sequence, how many last ones need logits."""
    if sequence.request.sampling.prompt_logprobs is not None and sequence.num_computed < len(sequence.request.prompt_ids):
        return count
    return int(samples(sequence, count))


def may_run_ahead(sequence: Sequence) -> bool:
    """Whether the sequence's next token can be computed and drawn before the host knows the one before.

    Not when the host decides what may be drawn, or hands out more about a step than its tokens.
    """
    request, sampling = sequence.request, sequence.request.sampling
    asks_for_more = sampling.logprobs is not None or sampling.prompt_logprobs is not None or request.trace is not None
    return not asks_for_more and not adjusts(sequence)


class DecodeRows(NamedTuple):
    """What a step reads of its decoding sequences, one number per sequence in each list."""

    input_ids: list[int]  # zeros where the batch runs ahead: the tokens are on the device
    positions: list[int]
    policy_ids: list[int]
    slot_mapping: list[int]
    context_lens: list[int]


def decode_rows(batch: Batch, block_size: int) -> DecodeRows:
    """Lay out the batch's decoding sequences."""
    ahead = batch.previous is not None
    positions = [sequence.num_computed + ahead for sequence in batch.decode]
    placed = list(zip(batch.decode, positions, strict=True))
    return DecodeRows(
        input_ids=[0 if ahead else sequence.token_ids(p, p + 1)[0] for sequence, p in placed],
        positions=positions,
        policy_ids=[sequence.policy_row for sequence in batch.decode],
        slot_mapping=[sequence.block_table[p // block_size] * block_size + p % block_size for sequence, p in placed],
        context_lens=[p + 1 for p in positions],
    )


def make_step_inputs(batch: Batch, block_size: int, device: torch.device) -> StepInputs:
    """Lay the batch out as tensors: decode rows first, then the prefill segments one after another."""
    input_ids, positions, policy_ids, slots, context_lens = decode_rows(batch, block_size)
    logit_indices = list(range(len(batch.decode)))
    segments: list[PrefillSegment] = []
    for row, (sequence, count) in enumerate(batch.prefill, start=len(batch.decode)):
        begin, end = sequence.num_computed, sequence.num_computed + count
        segments.append(PrefillSegment(row, len(input_ids), count, end))
        input_ids += sequence.token_ids(begin, end)
        positions += range(begin, end)
        slots += [sequence.block_table[p // block_size] * block_size + p % block_size for p in range(begin, end)]
        policy_ids += [sequence.policy_row] * count
        context_lens.append(end)
        logit_indices += range(len(input_ids) - num_logits(sequence, count), len(input_ids))
    width = -(-max(context_lens) // block_size)
    tables = [(sequence.block_table + [0] * width)[:width] for sequence, _ in batch.scheduled]

    def tensor(values: list[Any]) -> torch.Tensor:
        return to_device(values, torch.int64, device)

    # One copy, as making a tensor costs more than what is in it.
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
        logit_indices=tensor(logit_indices) if segments else None,  # decoding rows all have theirs
    )
