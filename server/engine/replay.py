"""Computes finished answers again while the engine has nothing else to do, to compare their policy with a more accurate one."""

from collections import deque
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.transformer import MoeTransformer
from server.engine.batch import Batch, make_step_inputs
from server.engine.messages import Replay, Replayed
from server.engine.policy_table import PolicyTable
from server.engine.request import GenerationRequest, SamplingParams, Sequence

MAX_TOKENS = 1024  # of prompt and answer together; longer ones are not replayed, because the cache holds no more
MAX_PENDING = 64  # a new replay displaces the oldest one
STEP_TOKENS = 16  # of one step, twice: a request that comes now waits no longer than this takes


class Replayer:
    """Replays one answer at a time, in short steps. It has a KV cache of its own, so it takes no block from requests and
    displaces nothing in the prefix cache. It counts no experts. All methods must be called on the engine thread."""

    def __init__(self, model: MoeTransformer, table: PolicyTable, max_tokens: int, block_size: int) -> None:
        self.max_tokens = max_tokens
        self._model, self._table, self._block_size = model, table, block_size
        blocks = -(-max_tokens // block_size)
        self._cache = model.backend.allocate_cache(model.config, 2 * blocks + 1, block_size)
        self._block_tables = [list(range(1, blocks + 1)), list(range(blocks + 1, 2 * blocks + 1))]
        self._pending: deque[Replay] = deque(maxlen=MAX_PENDING)
        self._current: _Progress | None = None

    @property
    def has_work(self) -> bool:
        return self._current is not None or bool(self._pending)

    def add(self, answer: Replay) -> None:
        assert answer.output_ids and len(answer.prompt_ids) + len(answer.output_ids) <= self.max_tokens
        self._pending.append(answer)

    def step(self) -> Replayed | None:
        """Compute the next few tokens of the current answer. Returns its figures when it is complete.

        Must be called only while no request runs. An answer is dropped if the table has too few rows for both policies.
        """
        progress = self._current or _Progress(self._pending.popleft(), self._block_tables)
        self._current = None
        answer = progress.answer
        rows = self._table.acquire((answer.policy, answer.reference))
        if rows is None:
            return None
        try:
            self._compute(progress, rows)
        finally:
            self._table.release(rows)
        if progress.sequences[0].num_computed == progress.sequences[0].num_tokens:
            policy = answer.policy
            return Replayed(policy.name, policy.version, len(answer.output_ids), progress.agreeing, max(progress.kl, 0.0))
        self._current = progress
        return None

    @torch.inference_mode()
    def _compute(self, progress: "_Progress", rows: tuple[int, ...]) -> None:
        count = progress.next_count()
        for sequence, row in zip(progress.sequences, rows, strict=True):
            sequence.rows = (row,)
        batch = Batch(prefill=[(sequence, count) for sequence in progress.sequences])
        self._model.backend.begin_step(batch.num_tokens)
        inputs = make_step_inputs(batch, self._block_size, self._cache.k.device)
        logits = self._model.step(inputs, self._cache, self._table.tables).logits
        progress.advance(count, logits)


class _Progress:
    """A replay under way: the answer under its own policy and under the reference, as two prompts."""

    def __init__(self, answer: Replay, block_tables: list[list[int]]) -> None:
        self.answer = answer
        self.agreeing, self.kl = 0, 0.0
        tokens = (*answer.prompt_ids, *answer.output_ids[:-1])  # the pass over the last one would draw a further token
        request = GenerationRequest("", tokens, SamplingParams(max_tokens=1), answer.policy)
        self.sequences = [Sequence(request, (), 0, 0.0, [], block_table=table) for table in block_tables]

    def next_count(self) -> int:
        """How many tokens the next step computes. A step has either tokens without logits, or tokens that drew the answer."""
        done, before = self.sequences[0].num_computed, len(self.answer.prompt_ids) - 1
        if done < before:
            return min(STEP_TOKENS, before - done)
        for sequence in self.sequences:
            sequence.request = replace(sequence.request, sampling=SamplingParams(max_tokens=1, prompt_logprobs=0))
        return min(STEP_TOKENS, self.sequences[0].num_tokens - done)

    def advance(self, count: int, logits: Tensor) -> None:
        """Take the logits of a step: [2 * count, V], first those of the answer's own policy; empty before the answer."""
        if len(logits):
            own, reference = logits.float().log_softmax(dim=-1).split(count)
            self.agreeing += int((own.argmax(dim=-1) == reference.argmax(dim=-1)).sum())
            self.kl += F.kl_div(own, reference, reduction="sum", log_target=True).item()
        for sequence in self.sequences:
            sequence.num_computed += count
