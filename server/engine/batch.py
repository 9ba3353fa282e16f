"""One step's work as the scheduler sees it (sequences, integers) and as the model sees it (tensors)."""

from dataclasses import dataclass, field

import torch

from ladimo.model.inputs import PrefillSegment, StepInputs
from server.engine.request import Sequence


@dataclass(slots=True)
class Batch:
    """`decode`: sequences of which only the last token is not computed yet. `prefill`: sequences and how many of their next
    tokens this step computes. Results come back in this order, decode first."""

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)

    @property
    def scheduled(self) -> list[tuple[Sequence, int]]:
        return [(sequence, 1) for sequence in self.decode] + self.prefill

    @property
    def num_tokens(self) -> int:
        return len(self.decode) + sum(count for _, count in self.prefill)


def samples(sequence: Sequence, count: int) -> bool:
    """Whether computing the next `count` tokens of the sequence reaches its end, so that a new token follows."""
    return sequence.num_computed + count == sequence.num_tokens


def num_logits(sequence: Sequence, count: int) -> int:
    """Of the next `count` tokens of the sequence, how many last ones need logits."""
    if sequence.request.sampling.prompt_logprobs is not None and sequence.num_computed < len(sequence.request.prompt_ids):
        return count
    return int(samples(sequence, count))


def make_step_inputs(batch: Batch, block_size: int, device: torch.device) -> StepInputs:
    """Lay the batch out as tensors: decode rows first, then the prefill segments one after another."""
    scheduled = batch.scheduled
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    policy_ids: list[int] = []
    segments: list[PrefillSegment] = []
    context_lens: list[int] = []
    logit_indices: list[int] = []
    for row, (sequence, count) in enumerate(scheduled):
        begin, end = sequence.num_computed, sequence.num_computed + count
        if row >= len(batch.decode):
            segments.append(PrefillSegment(row, len(input_ids), count, end))
        input_ids += sequence.token_ids(begin, end)
        positions += range(begin, end)
        slots += [sequence.block_table[p // block_size] * block_size + p % block_size for p in range(begin, end)]
        policy_ids += [sequence.policy_row] * count
        context_lens.append(end)
        logit_indices += range(len(input_ids) - num_logits(sequence, count), len(input_ids))
    width = -(-max(context_lens) // block_size)
    tables = [(sequence.block_table + [0] * width)[:width] for sequence, _ in scheduled]

    def tensor(values: object) -> torch.Tensor:
        host = torch.tensor(values, dtype=torch.int64)
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)

    return StepInputs(
        input_ids=tensor(input_ids),
        positions=tensor(positions),
        policy_ids=tensor(policy_ids),
        slot_mapping=tensor(slots),
        block_table=tensor(tables),
        context_lens=tensor(context_lens),
        num_decode=len(batch.decode),
        prefill=tuple(segments),
        logit_indices=tensor(logit_indices),
    )
