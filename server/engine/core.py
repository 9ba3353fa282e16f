"""The engine without threads: it takes commands, runs one step at a time and returns reports. Knows no asyncio and no HTTP."""

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from server.engine.batch import Batch, PolicyRun, samples, tokens_by_policy
from server.engine.config import EngineLimits
from server.engine.messages import (
    Abort,
    Activate,
    Activated,
    Command,
    PolicyTableFull,
    ReadExperts,
    Rebind,
    Rebinding,
    Rebound,
    Replay,
    Replayed,
    Report,
    RequestStats,
    RoutingTrace,
    StepResult,
    StepStats,
    Stop,
    Submit,
    TokenEvent,
)
from server.engine.model_runner import BatchOutput, still_there
from server.engine.policy_table import PolicyTable
from server.engine.replay import Replayer
from server.engine.request import FinishReason, GenerationRequest, Sequence, TokenRouting, Trace
from server.engine.scheduling.row_queue import RowQueue
from server.engine.scheduling.scheduler import Scheduler
from server.engine.tally import Tally
from server.engine.weight_bytes import WeightBytes

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Computes batches. Called from the engine thread only. `graph_captures`: the number of CUDA graphs captured so far."""

    @property
    def graph_captures(self) -> int: ...

    def graph_bucket(self, batch: Batch) -> int | None:
        """The number of rows of the graph that the batch will replay; None if it runs without a graph.

        A step may run ahead only after a step that replays a graph.
        """

    def launch(self, batch: Batch) -> Callable[[], BatchOutput]:
        """Start to compute the batch. Call the returned function once to wait for the output.

        Until then, only the next batch may be launched, and only if it runs ahead.
        """


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that has been launched. `wait` returns its output; None if there was nothing to compute. `bucket`: the rows of its
    CUDA graph, if any. `started`: when the device began to work on it, by the core's clock. `decode_runs`, `prefill_runs`: the
    policies of its tokens."""

    batch: Batch
    wait: Callable[[], BatchOutput] | None
    bucket: int | None
    started: float
    decode_runs: list[PolicyRun]
    prefill_runs: list[PolicyRun]


class EngineCore:
    """Carries out commands and runs steps. All methods must be called on one thread."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        table: PolicyTable,
        limits: EngineLimits,
        eos_token_ids: frozenset[int],
        clock: Callable[[], float] = time.monotonic,
        replayer: Replayer | None = None,
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._runner, self._scheduler, self._table = runner, scheduler, table
        self._row_queue = RowQueue(table)
        self._eos_token_ids, self._replayer = eos_token_ids, replayer
        self._weight_bytes = WeightBytes(table.config)
        self._moe_layers = frozenset(table.config.moe_layer_indices)
        self._finished: list[RequestStats] = []
        self._reported = (0, 0, 0, 0)
        self._flight: _Flight | None = None  # the next step, if it was launched early
        self._ended: float | None = None  # when the last step ended; None while there is no work

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute or to report."""
        return self._scheduler.has_work or bool(self._finished) or self._flight is not None

    @property
    def has_spare_work(self) -> bool:
        """Whether `spare_step` has something to compute. It can wait as long as there is other work."""
        return self._replayer is not None and self._replayer.has_work

    def handle(self, command: Command) -> Report | None:
        """Carry out one command between two steps."""
        match command:
            case Submit(request):
                self._submit(request)
            case Rebind(changes):
                return self._rebind(changes)
            case Abort(request_id, reason):
                sequence = self._row_queue.remove(request_id) or self._scheduler.remove(request_id)
                if sequence is not None:
                    self._retire(sequence, reason, self._clock())
                    self._give_rows()
            case Activate(call_id, policies):
                try:
                    self._table.set_resident(policies)
                except PolicyTableFull as error:
                    return Activated(call_id, error)
                self._row_queue.reopen()
                self._give_rows()
                return Activated(call_id)
            case ReadExperts(call_id):
                return self._table.snapshot(call_id)
            case Replay():
                if self._replayer is not None:
                    self._replayer.add(command)
            case Stop():
                raise AssertionError("the loop handles Stop")
        return None

    def step(self) -> StepResult:
        """Run one step: schedule, compute, update. Returns its events and statistics.

        If the next step does not depend on what the host does with this step's tokens, it is launched at once. The device then
        computes the next step while the host handles the tokens of this one.
        """
        flight = self._flight or self._launch(self._scheduler.schedule())
        ahead = None if flight.bucket is None else self._scheduler.schedule_ahead(flight.batch)
        self._flight = None if ahead is None else self._launch(ahead)
        result = self._land(flight)
        if self._flight is not None:  # the device was busy with the step before until now
            self._flight = replace(self._flight, started=self._clock())
        return result

    def spare_step(self) -> Replayed | None:
        """Go on with a replay for a short time. Returns the figures of a complete one. An error only ends the replays."""
        assert self._replayer is not None and not self.has_work
        try:
            return self._replayer.step()
        except Exception:
            logger.exception("a replay failed; nothing is replayed from now on")
            self._replayer = None
            return None

    def _launch(self, batch: Batch) -> _Flight:
        started = self._clock()
        for sequence, _ in batch.scheduled:
            if sequence.scheduled is None:
                sequence.scheduled = started
        runs = batch.decode_runs, batch.prefill_runs
        if not batch.num_tokens:
            return _Flight(batch, None, None, started, *runs)
        self._table.add_routed(tokens_by_policy(runs[0] + runs[1]))
        return _Flight(batch, self._runner.launch(batch), self._runner.graph_bucket(batch), started, *runs)

    def _land(self, flight: _Flight) -> StepResult:
        """Wait for the step's output, then update sequences, blocks and counters."""
        batch = flight.batch
        events: list[TokenEvent] = []
        stats, weight_bytes = Tally(), 0.0
        if flight.wait is not None:
            output = flight.wait()
            if batch.previous is not None:
                batch, output = still_there(batch, output)
            scheduled = batch.scheduled
            self._account(scheduled, output)
            policies = {policy.version: policy for policy, _ in flight.decode_runs + flight.prefill_runs}
            weight_bytes = self._weight_bytes.of_step(policies.values(), sum(output.refined_rows))
            traces = [
                self._trace(sequence, routing)
                for (sequence, count), routing in zip(scheduled, output.routing, strict=True)
                if samples(sequence, count)
            ]
            drawn_ids = [drawn.token_id for drawn in output.drawn]
            outcomes = self._scheduler.update(batch, drawn_ids, self._eos_token_ids)
            now = self._clock()
            for (sequence, reason), drawn, trace in zip(outcomes, output.drawn, traces, strict=True):
                first = sequence.first_token is None
                stats.token(sequence, now)
                sequence.follow_phases()
                finished = None if reason is None else self._retire(sequence, reason, now)
                events.append(
                    TokenEvent(
                        request_id=sequence.request.request_id,
                        token_id=drawn.token_id,
                        experts_per_token=self._experts_per_token(sequence),
                        phase=sequence.phase(sequence.num_computed - 1),
                        refined_rows=sequence.refined_rows / max(sequence.num_routed, 1),
                        finished=finished,
                        logprobs=drawn.logprobs,
                        cached_tokens=min(sequence.num_cached, len(sequence.request.prompt_ids)),
                        prompt_logprobs=tuple(sequence.prompt_logprobs) if first and sequence.prompt_logprobs else None,
                        trace=trace,
                    )
                )
        self._give_rows()
        scheduler = self._scheduler
        totals = (scheduler.preemptions, scheduler.prefix_queries, scheduler.prefix_hits, self._runner.graph_captures)
        preemptions, queries, hits, captures = (now - before for now, before in zip(totals, self._reported, strict=True))
        self._reported = totals
        finished_now, self._finished = self._finished, []
        ended, before = self._clock(), self._ended
        self._scheduler.took(flight.batch, ended - flight.started)
        self._ended = ended if self._scheduler.has_work else None
        return StepResult(
            events,
            StepStats(
                seconds=ended - flight.started,
                prefill_tokens=sum(count for _, count in flight.batch.prefill),
                decode_tokens=len(flight.batch.decode),
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting) + len(self._row_queue),
                kv_cache_usage_ratio=self._scheduler.blocks.usage_ratio,
                prompt_limit=self._scheduler.prompt_limit,
                preemptions=preemptions,
                weight_bytes=weight_bytes,
                prefix_cache_queries=queries,
                prefix_cache_hits=hits,
                first_token_seconds=stats.first_token_seconds,
                inter_token_seconds=stats.inter_token_seconds,
                prompt_tokens=dict(stats.prompt_tokens),
                generation_tokens=dict(stats.generation_tokens),
                finished=finished_now,
                cuda_graph_bucket=flight.bucket,
                cuda_graph_missed=self._runner.graph_captures > 0 and bool(flight.batch.decode) and flight.bucket is None,
                cuda_graph_captures=captures,
                interval_seconds=ended - (flight.started if before is None else before),
                decode_rows=tokens_by_policy(flight.decode_runs),
                prefilled_tokens=tokens_by_policy(flight.prefill_runs),
            ),
        )

    def _submit(self, request: GenerationRequest) -> None:
        assert 0 < len(request.prompt_ids) < self.limits.max_model_len
        assert request.sampling.max_tokens > 0
        assert len({policy.version for policy in request.policies}) <= self.limits.max_policies
        seed = request.sampling.seed
        self._row_queue.add(
            Sequence(
                request=request,
                rows=(),
                seed=secrets.randbits(63) if seed is None else seed,
                arrived=self._clock(),
                expert_counts=[0] * self._table.config.num_hidden_layers,
                prompt_logprobs=[None] if request.sampling.prompt_logprobs is not None else [],
            )
        )
        self._give_rows()

    def _rebind(self, changes: Iterable[Rebinding]) -> Rebound:
        both = (*self._row_queue, *self._scheduler.waiting)
        fresh = {sequence.request.request_id: sequence for sequence in both if sequence.scheduled is None}
        changed = []
        for change in changes:
            sequences = [fresh[each] for each in change.request_ids if each in fresh]
            whole = len(sequences) == len(change.request_ids)
            assert len({policy.version for policy in change.policies}) <= self.limits.max_policies
            changed.append(whole and self._row_queue.rebind(sequences, change.policies))
        self._give_rows()
        return Rebound(tuple(changed))

    def _give_rows(self) -> None:
        """Give rows of the policy table to waiting sequences, and hand these to the scheduler.

        A sequence that gets no rows waits until the scheduler's sequences end and free some.
        """
        for sequence in self._row_queue.take():
            self._scheduler.add(sequence)
        assert not self._row_queue or self._scheduler.has_work

    def _account(self, scheduled: list[tuple[Sequence, int]], output: BatchOutput) -> None:
        """Record expert counts, prompt log-probabilities and traces. Must run before `update` changes `num_computed`."""
        figures = zip(scheduled, output.expert_counts, output.refined_rows, output.prompt_logprobs, output.routing, strict=True)
        for (sequence, count), experts, refined, logprobs, routing in figures:
            sequence.num_routed += count
            sequence.refined_rows += refined
            sequence.expert_counts = [total + new for total, new in zip(sequence.expert_counts, experts, strict=True)]
            if logprobs:  # for the tokens after the computed ones; a recomputed prompt gives the same values
                sequence.prompt_logprobs[sequence.num_computed + 1 :] = logprobs
            if sequence.request.trace is Trace.PROMPT:
                sequence.trace_prompt(count, routing)

    def _trace(self, sequence: Sequence, routing: list[TokenRouting]) -> RoutingTrace | None:
        """The routing trace of the token that this step drew; None if the request is not traced.

        `routing` has the tokens that the step computed. Must be called before `update` appends the token.
        """
        if sequence.request.trace is None:
            return None
        first = sequence.request.trace is Trace.PROMPT and sequence.first_token is None
        return RoutingTrace(
            tokens=(routing[-1],),
            prompt=tuple(sequence.prompt_routing) if first else None,
            recomputed=tuple(sequence.recomputed),
        )

    def _experts_per_token(self, sequence: Sequence) -> tuple[float | None, ...]:
        tokens = max(sequence.num_routed, 1)
        return tuple(
            total / tokens if layer in self._moe_layers else None for layer, total in enumerate(sequence.expert_counts)
        )

    def _retire(self, sequence: Sequence, reason: FinishReason, now: float) -> RequestStats:
        self._table.release(sequence.rows)
        first = sequence.first_token
        stats = RequestStats(
            request_id=sequence.request.request_id,
            policy=sequence.request.policy.name,
            finish_reason=reason,
            prompt_tokens=len(sequence.request.prompt_ids),
            generation_tokens=len(sequence.output_ids),
            cached_tokens=min(sequence.num_cached, len(sequence.request.prompt_ids)),
            queue_seconds=(sequence.scheduled or now) - sequence.arrived,
            time_to_first_token_seconds=None if first is None else first - sequence.arrived,
            e2e_seconds=now - sequence.arrived,
            experts_per_token=self._experts_per_token(sequence),
        )
        self._finished.append(stats)
        return stats
