"""Which sequences the next step works on. Host integers only; no tensor, no clock.

Contract: the engine calls `schedule()`, has the batch computed, then calls `update()` with the tokens drawn, before it calls
`schedule()` again. In between it may `add` and `remove`, and once `schedule_ahead()`; that batch's `update()` comes second, and
without the sequences that the first one ended.
"""

from bisect import insort
from operator import attrgetter

from server.engine.batch import Batch, may_run_ahead, samples
from server.engine.request import FinishReason, Sequence, Trace
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.fair_share import OUTPUT_COST, PROMPT_COST, FairShare


class Scheduler:
    """One token budget per step: running sequences decode first, the rest goes to prompts in chunks, by priority and then age.
    Among waiting ones of equal priority the flow that has been served least comes before age.

    Blocks are taken as tokens come. When they run out, the last running sequence in that order is preempted: it gives its
    blocks back and returns to the queue to be computed again. One sequence always fits (`max_model_len` is no larger than the
    cache), so the first always makes progress.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_step_tokens: int,
        max_model_len: int,
        prefix_caching: bool = True,
    ) -> None:
        assert blocks.blocks_for(max_model_len) < blocks.num_blocks
        self.blocks = blocks
        self.max_num_seqs, self.max_step_tokens, self.max_model_len = max_num_seqs, max_step_tokens, max_model_len
        self.waiting: list[Sequence] = []  # both in order of rank
        self.running: list[Sequence] = []
        self.prefix_caching = prefix_caching
        self.share = FairShare()
        self.preemptions = self.prefix_queries = self.prefix_hits = 0  # ever

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.share.enter(sequence.request.flow)
        insort(self.waiting, sequence, key=attrgetter("rank"))

    def remove(self, request_id: str) -> Sequence | None:
        """Forget a request wherever it is and free its blocks; None when it is not here (any more)."""
        for queue in (self.running, self.waiting):
            for sequence in queue:
                if sequence.request.request_id == request_id:
                    queue.remove(sequence)
                    self.blocks.release(sequence.block_table)
                    self.share.leave(sequence.request.flow)
                    return sequence
        return None

    def schedule(self) -> Batch:
        batch = Batch()
        preemptions = self.preemptions
        self._schedule_decodes(batch)
        self._schedule_running_prompts(batch)
        if self.preemptions == preemptions:  # else memory is short: admitting would only move blocks back and forth
            self._admit(batch)
        assert batch.num_tokens > 0 or not self.has_work
        return batch

    def schedule_ahead(self, in_flight: Batch) -> Batch | None:
        """The step after `in_flight`, whose tokens are not known yet; None when it has to wait for them.

        It can be known beforehand when every running sequence decodes, none waits that could be admitted, what is drawn depends
        on nothing the host would have to say, and there are blocks for one more token each. A sequence that turns out to have
        ended is computed once more in vain; its blocks may have a new owner by then, who writes to them later.
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
        """Append the drawn tokens (one per sequence whose end was reached, in batch order) and retire what is finished.

        Returns the sequences that got a token, each with its finish reason or None.
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
        """`count` more tokens are in the cache; publish the blocks that this filled."""
        size, begin = self.blocks.block_size, sequence.num_computed
        sequence.num_computed += count
        settled = sequence.num_computed
        if sequence.request.policy.has_batch_budget:
            # What decoding computed, the last prompt token included, depends on the others of its step.
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
        """Whether the sequence ends for its length once it has `num_tokens` tokens."""
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

    def _schedule_running_prompts(self, batch: Batch) -> None:
        index = 0
        while index < len(self.running) and batch.num_tokens < self.max_step_tokens:
            sequence = self.running[index]
            index += 1
            remaining = sequence.num_tokens - sequence.num_computed
            if remaining == 1:
                continue
            count = min(remaining, self.max_step_tokens - batch.num_tokens)
            end = sequence.num_computed + count
            # When others run they will finish and free blocks; only when nothing can run must the last make room.
            fits = self.blocks.extend(sequence.block_table, end) if batch.num_tokens else self._make_room(sequence, end)
            if not fits:
                return
            batch.prefill.append((sequence, count))

    def _admit(self, batch: Batch) -> None:
        while self.waiting and batch.num_tokens < self.max_step_tokens and len(self.running) < self.max_num_seqs:
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
            if not sequence.charged:  # computing it again after a preemption is not its doing
                sequence.charged = True
                self.share.charge(sequence.request.flow, PROMPT_COST * remaining)
            count = min(remaining, self.max_step_tokens - batch.num_tokens)
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
        # The first of equals, which is the oldest: `waiting` is in order of rank.
        return min(self.waiting, key=lambda sequence: (sequence.request.priority, self.share.served(sequence.request.flow)))

    def _may_share(self, sequence: Sequence) -> bool:
        # The log-probabilities and the trace of a prompt need every one of its tokens computed.
        request = sequence.request
        return self.prefix_caching and request.sampling.prompt_logprobs is None and request.trace is not Trace.PROMPT

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the sequence's first tokens already; the last token is always left to compute."""
        if not self._may_share(sequence):
            return []
        size = self.blocks.block_size
        return self.blocks.find(sequence.prefix_keys((sequence.num_tokens - 1) // size, size))

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the first `num_tokens` of a running sequence, preempting later ones; False when it had to go itself."""
        while not self.blocks.extend(sequence.block_table, num_tokens):
            last = self.running.pop()
            self.blocks.release(last.block_table)
            last.num_computed = 0
            insort(self.waiting, last, key=attrgetter("rank"))
            self.preemptions += 1
            if last is sequence:
                return False
        return True
