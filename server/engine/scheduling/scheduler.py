"""Chooses the sequences that the next step computes. It handles integers on the host only: no tensors and no clock.

The engine calls `schedule()`, computes the batch, and calls `update()` with the drawn tokens. Only then may it call
`schedule()` again. In between it may call `add` and `remove`, and once `schedule_ahead()`. The batch that runs ahead is updated
after the first one, without the sequences that ended in the meantime.
"""

from bisect import insort
from itertools import takewhile
from operator import attrgetter

from server.engine.batch import Batch, may_run_ahead, samples
from server.engine.request import FinishReason, Sequence, Trace
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.chunks import ChunkSizes
from server.engine.scheduling.fair_share import OUTPUT_COST, PROMPT_COST, FairShare


class Scheduler:
    """Fills each step with at most `max_step_tokens` tokens. Running sequences decode first. The rest of the budget, or less if
    `chunks` says so, goes to chunks of prompts, by rank: priority and age together. Among waiting sequences of equal priority,
    the flow that has been served least goes first, then the oldest sequence.

    A sequence takes blocks as it grows. When the blocks run out, the last running sequence is preempted: it gives its blocks
    back, waits again, and is later computed from its beginning. The cache always has room for one sequence of `max_model_len`
    tokens, so the first sequence always makes progress.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_step_tokens: int,
        max_model_len: int,
        prefix_caching: bool = True,
        chunks: ChunkSizes | None = None,
    ) -> None:
        assert blocks.blocks_for(max_model_len) < blocks.num_blocks
        self.blocks = blocks
        self.max_num_seqs, self.max_step_tokens, self.max_model_len = max_num_seqs, max_step_tokens, max_model_len
        self.waiting: list[Sequence] = []  # `waiting` and `running` are sorted by rank
        self.running: list[Sequence] = []
        self.prefix_caching, self.chunks = prefix_caching, chunks
        self.prompt_limit = 0  # how many prompt tokens the last batch could have
        self.share = FairShare()
        self.preemptions = self.prefix_queries = self.prefix_hits = 0  # totals since the start; the last two in tokens

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Add a sequence that has a row of the policy table. It waits until `schedule` admits it."""
        self.share.enter(sequence.request.flow)
        insort(self.waiting, sequence, key=attrgetter("rank"))

    def remove(self, request_id: str) -> Sequence | None:
        """Remove a request, free its blocks and return its sequence; None if it neither waits nor runs."""
        for queue in (self.running, self.waiting):
            for sequence in queue:
                if sequence.request.request_id == request_id:
                    queue.remove(sequence)
                    self.blocks.release(sequence.block_table)
                    self.share.leave(sequence.request.flow)
                    return sequence
        return None

    def schedule(self) -> Batch:
        """The next step's batch. It is empty only if there is no work."""
        batch = Batch()
        preemptions = self.preemptions
        self._schedule_decodes(batch)
        self.prompt_limit = self.max_step_tokens - batch.num_tokens
        if self.chunks is not None:
            self.prompt_limit = min(self.prompt_limit, self.chunks.tokens(len(batch.decode)))
        limit = batch.num_tokens + self.prompt_limit
        self._schedule_running_prompts(batch, limit)
        if self.preemptions == preemptions:  # else blocks are short, and an admitted sequence would soon be preempted
            self._admit(batch, limit)
        assert batch.num_tokens > 0 or not self.has_work
        return batch

    def took(self, batch: Batch, seconds: float) -> None:
        """Note how long a step has taken. Later chunks of prompts may depend on it."""
        if self.chunks is not None and batch.num_tokens:
            self.chunks.observe(len(batch.decode), batch.num_tokens - len(batch.decode), seconds)

    def schedule_ahead(self, in_flight: Batch) -> Batch | None:
        """The step after `in_flight`, before the tokens of `in_flight` are known. None if it must wait for them.

        It need not wait if all of these hold: every running sequence decodes, no waiting sequence could be admitted, the host
        has no say in the draws (`may_run_ahead`), and there are blocks for one more token of each sequence. A sequence that
        turns out to have ended is computed once more for nothing. Its blocks may belong to another sequence by then, which is
        safe: that sequence writes to them later.
        """
        if in_flight.prefill or (self.waiting and len(self.running) < self.max_num_seqs):
            return None
        rows = [(row, sequence) for row, sequence in enumerate(in_flight.decode) if sequence.block_table]
        if len(rows) < len(self.running) or not all(may_run_ahead(sequence) for _, sequence in rows):
            return None
        rows = [(row, sequence) for row, sequence in rows if not self._is_full(sequence, sequence.num_tokens + 1)]
        fits = all(self.blocks.extend(sequence.block_table, sequence.num_tokens + 1) for _, sequence in rows)
        return Batch(decode=[sequence for _, sequence in rows], previous=[row for row, _ in rows]) if rows and fits else None

    def update(
        self, batch: Batch, token_ids: list[int], eos_token_ids: frozenset[int]
    ) -> list[tuple[Sequence, FinishReason | None]]:
        """Append the drawn tokens and remove the finished sequences.

        `token_ids` has one token for each sequence that the batch computed to its end, in batch order. Returns these sequences,
        each with its finish reason or None.
        """
        drawn = iter(token_ids)
        outcomes: list[tuple[Sequence, FinishReason | None]] = []
        for sequence, count in batch.scheduled:
            reaches_end = samples(sequence, count)
            self._compute(sequence, count)
            if not reaches_end:
                continue
            sequence.output_ids.append(next(drawn))
            self.share.charge(sequence.request.flow, OUTPUT_COST)
            reason = self._finish_reason(sequence, eos_token_ids)
            if reason is not None:
                self.running.remove(sequence)
                self.blocks.release(sequence.block_table)
                self.share.leave(sequence.request.flow)
            outcomes.append((sequence, reason))
        assert next(drawn, None) is None
        return outcomes

    def _compute(self, sequence: Sequence, count: int) -> None:
        """Note that `count` more tokens are in the cache, and publish the blocks that are full now."""
        size, begin = self.blocks.block_size, sequence.num_computed
        sequence.num_computed += count
        settled = sequence.num_computed
        if any(policy.has_batch_budget for policy in sequence.request.policies):
            # A token computed in a decode step depends on the rest of its batch. The last prompt token may be one.
            settled = min(settled, len(sequence.request.prompt_ids) - 1)
        filled = range(begin // size, settled // size)
        if self.prefix_caching and filled:
            keys = sequence.prefix_keys(filled.stop, size)
            for index in filled:
                self.blocks.publish(sequence.block_table[index], keys[index])

    def _finish_reason(self, sequence: Sequence, eos_token_ids: frozenset[int]) -> FinishReason | None:
        sampling, token = sequence.request.sampling, sequence.output_ids[-1]
        if token in sampling.stop_token_ids or (token in eos_token_ids and not sampling.ignore_eos):
            return FinishReason.STOP
        return FinishReason.LENGTH if self._is_full(sequence, sequence.num_tokens) else None

    def _is_full(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the sequence must end when it has `num_tokens` tokens, because of max_tokens or the context length."""
        request = sequence.request
        return num_tokens - len(request.prompt_ids) >= request.sampling.max_tokens or num_tokens >= self.max_model_len

    def _schedule_decodes(self, batch: Batch) -> None:
        index = 0
        while index < len(self.running) and batch.num_tokens < self.max_step_tokens:
            sequence = self.running[index]
            index += 1
            if sequence.num_tokens - sequence.num_computed == 1:
                if not self._make_room(sequence, sequence.num_tokens):
                    return
                batch.decode.append(sequence)

    def _schedule_running_prompts(self, batch: Batch, limit: int) -> None:
        """Add chunks up to `limit` tokens of the batch."""
        index = 0
        while index < len(self.running) and batch.num_tokens < limit:
            sequence = self.running[index]
            index += 1
            remaining = sequence.num_tokens - sequence.num_computed
            if remaining == 1:
                continue
            count = min(remaining, limit - batch.num_tokens)
            end = sequence.num_computed + count
            # If the step has other work, wait until it frees blocks. If it has none, preempt the last sequences.
            fits = self.blocks.extend(sequence.block_table, end) if batch.num_tokens else self._make_room(sequence, end)
            if not fits:
                return
            batch.prefill.append((sequence, count))

    def _admit(self, batch: Batch, limit: int) -> None:
        """Add waiting sequences up to `limit` tokens of the batch."""
        while self.waiting and batch.num_tokens < limit and len(self.running) < self.max_num_seqs:
            sequence = self._next_waiting()
            cached = self._cached_prefix(sequence)
            missing = self.blocks.blocks_for(sequence.num_tokens) - len(cached)
            if missing > self.blocks.num_free - self.blocks.num_idle(cached):
                return
            self.blocks.hold(cached)
            sequence.block_table += cached
            sequence.num_computed = sequence.num_cached = len(cached) * self.blocks.block_size
            if self._may_share(sequence):
                self.prefix_queries += sequence.num_tokens
                self.prefix_hits += sequence.num_cached
            remaining = sequence.num_tokens - sequence.num_computed
            if not sequence.charged:  # a flow does not pay for recomputation after a preemption
                sequence.charged = True
                self.share.charge(sequence.request.flow, PROMPT_COST * remaining)
            count = min(remaining, limit - batch.num_tokens)
            taken = self.blocks.extend(sequence.block_table, sequence.num_computed + count)
            assert taken
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=attrgetter("rank"))
            if remaining == 1:
                batch.decode.append(sequence)
            else:
                batch.prefill.append((sequence, count))

    def _next_waiting(self) -> Sequence:
        if self.share.num_flows == 1:
            return self.waiting[0]
        lowest = min(sequence.request.priority for sequence in self.waiting)
        # Sequences that rank before all of the lowest number are so old that they take turns with these.
        aged = list(takewhile(lambda sequence: sequence.request.priority > lowest, self.waiting))
        turns = aged + [sequence for sequence in self.waiting if sequence.request.priority == lowest]
        # Of equals `min` takes the first, which is the oldest, because `waiting` is sorted by rank.
        return min(turns, key=lambda sequence: self.share.served(sequence.request.flow))

    def _may_share(self, sequence: Sequence) -> bool:
        # Log-probabilities and traces of a prompt need all of its tokens to be computed.
        request = sequence.request
        return self.prefix_caching and request.sampling.prompt_logprobs is None and request.trace is not Trace.PROMPT

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """The published blocks that hold the sequence's first tokens. They never include the last token, which must be
        computed."""
        if not self._may_share(sequence):
            return []
        size = self.blocks.block_size
        return self.blocks.find(sequence.prefix_keys((sequence.num_tokens - 1) // size, size))

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Get blocks for the first `num_tokens` tokens of a running sequence. Preempts sequences from the end if necessary.

        False if the sequence itself was preempted.
        """
        while not self.blocks.extend(sequence.block_table, num_tokens):
            last = self.running.pop()
            self.blocks.release(last.block_table)
            last.num_computed = 0
            insort(self.waiting, last, key=attrgetter("rank"))
            self.preemptions += 1
            if last is sequence:
                return False
        return True
