"""The engine without threads: commands in, one step at a time, reports out. Knows no asyncio and no HTTP."""

import secrets
import time
from collections import Counter
from pathlib import Path
from typing import Protocol

from ladimo.checkpoint import read_json
from ladimo.model.kv_cache import KVCache
from server.engine.batch import Batch
from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig, EngineLimits
from server.engine.messages import (
    Abort,
    Activate,
    Activated,
    Command,
    PolicyTableFull,
    ReadExperts,
    Report,
    RequestStats,
    StepResult,
    StepStats,
    Stop,
    Submit,
    TokenEvent,
)
from server.engine.model_runner import BatchOutput, ModelRunner, affordable_blocks, load
from server.engine.policy_table import PolicyTable
from server.engine.request import FinishReason, GenerationRequest, Sequence
from server.engine.scheduler import Scheduler


class Runner(Protocol):
    """What computes a batch: called once per step, from the engine thread only."""

    def execute(self, batch: Batch) -> BatchOutput: ...


class EngineCore:
    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        table: PolicyTable,
        limits: EngineLimits,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.limits = limits
        self._runner, self._scheduler, self._table = runner, scheduler, table
        self._eos_token_ids = eos_token_ids
        self._moe_layers = frozenset(table.config.moe_layer_indices)
        self._finished: list[RequestStats] = []
        self._reported = (0, 0, 0)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._finished)

    def handle(self, command: Command) -> Report | None:
        """Carry out one command between two steps."""
        match command:
            case Submit(request):
                return self._submit(request)
            case Abort(request_id, reason):
                sequence = self._scheduler.remove(request_id)
                if sequence is not None:
                    self._retire(sequence, reason, time.monotonic())
                return None
            case Activate(call_id, policies):
                try:
                    self._table.set_resident(policies)
                except PolicyTableFull as error:
                    return Activated(call_id, error)
                return Activated(call_id)
            case ReadExperts(call_id):
                return self._table.snapshot(call_id)
            case Stop():
                raise AssertionError("the loop handles Stop")

    def step(self) -> StepResult:
        """Schedule, execute, update; then what happened, as events and figures."""
        started = time.monotonic()
        batch = self._scheduler.schedule()
        for sequence, _ in batch.scheduled:
            if sequence.scheduled is None:
                sequence.scheduled = started
        events: list[TokenEvent] = []
        stats = _Tally()
        if batch.num_tokens:
            output = self._runner.execute(batch)
            self._account(batch, output)
            drawn_ids = [drawn.token_id for drawn in output.drawn]
            outcomes = self._scheduler.update(batch, drawn_ids, self._eos_token_ids)
            now = time.monotonic()
            for (sequence, reason), drawn in zip(outcomes, output.drawn, strict=True):
                first = sequence.first_token is None
                stats.token(sequence, now)
                finished = None if reason is None else self._retire(sequence, reason, now)
                events.append(
                    TokenEvent(
                        request_id=sequence.request.request_id,
                        token_id=drawn.token_id,
                        experts_per_token=self._experts_per_token(sequence),
                        finished=finished,
                        logprobs=drawn.logprobs,
                        cached_tokens=min(sequence.num_cached, len(sequence.request.prompt_ids)),
                        prompt_logprobs=tuple(sequence.prompt_logprobs) if first and sequence.prompt_logprobs else None,
                    )
                )
        totals = (self._scheduler.preemptions, self._scheduler.prefix_queries, self._scheduler.prefix_hits)
        preemptions, queries, hits = (now - before for now, before in zip(totals, self._reported, strict=True))
        self._reported = totals
        finished_now, self._finished = self._finished, []
        return StepResult(
            events,
            StepStats(
                seconds=time.monotonic() - started,
                prefill_tokens=sum(count for _, count in batch.prefill),
                decode_tokens=len(batch.decode),
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                kv_cache_usage_ratio=self._scheduler.blocks.usage_ratio,
                preemptions=preemptions,
                prefix_cache_queries=queries,
                prefix_cache_hits=hits,
                first_token_seconds=stats.first_token_seconds,
                inter_token_seconds=stats.inter_token_seconds,
                prompt_tokens=dict(stats.prompt_tokens),
                generation_tokens=dict(stats.generation_tokens),
                finished=finished_now,
            ),
        )

    def _submit(self, request: GenerationRequest) -> TokenEvent | None:
        assert 0 < len(request.prompt_ids) < self.limits.max_model_len
        assert request.sampling.max_tokens > 0
        try:
            row = self._table.acquire(request.policy)
        except PolicyTableFull as error:
            return TokenEvent(request.request_id, None, error=error)
        seed = request.sampling.seed
        self._scheduler.add(
            Sequence(
                request=request,
                policy_row=row,
                seed=secrets.randbits(63) if seed is None else seed,
                arrived=time.monotonic(),
                expert_counts=[0] * self._table.config.num_hidden_layers,
                prompt_logprobs=[None] if request.sampling.prompt_logprobs is not None else [],
            )
        )
        return None

    def _account(self, batch: Batch, output: BatchOutput) -> None:
        """What the step says of its sequences besides new tokens. Runs before `update` moves `num_computed`."""
        figures = zip(batch.scheduled, output.expert_counts, output.prompt_logprobs, strict=True)
        for (sequence, count), experts, logprobs in figures:
            sequence.num_routed += count
            sequence.expert_counts = [total + new for total, new in zip(sequence.expert_counts, experts, strict=True)]
            if logprobs:  # from the token after the first computed one on; a recomputed prompt says the same again
                sequence.prompt_logprobs[sequence.num_computed + 1 :] = logprobs
            self._table.add_routed(sequence.policy_row, count)

    def _experts_per_token(self, sequence: Sequence) -> tuple[float | None, ...]:
        tokens = max(sequence.num_routed, 1)
        return tuple(
            total / tokens if layer in self._moe_layers else None for layer, total in enumerate(sequence.expert_counts)
        )

    def _retire(self, sequence: Sequence, reason: FinishReason, now: float) -> RequestStats:
        self._table.release(sequence.policy_row)
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


class _Tally:
    """Latencies and token counts of one step, by policy."""

    def __init__(self) -> None:
        self.first_token_seconds: list[tuple[str, float]] = []
        self.inter_token_seconds: list[tuple[str, float]] = []
        self.prompt_tokens: Counter[str] = Counter()
        self.generation_tokens: Counter[str] = Counter()

    def token(self, sequence: Sequence, now: float) -> None:
        policy = sequence.request.policy.name
        if sequence.last_token is None:
            sequence.first_token = now
            self.first_token_seconds.append((policy, now - sequence.arrived))
            self.prompt_tokens[policy] += len(sequence.request.prompt_ids)
        else:
            self.inter_token_seconds.append((policy, now - sequence.last_token))
        sequence.last_token = now
        self.generation_tokens[policy] += 1


def build_core(directory: Path, config: EngineConfig) -> EngineCore:
    """Load the model and allocate everything the engine will ever use. Raises ValueError when it cannot be served so."""
    model = load(directory, config.device, config.dtype)
    context = model.config.max_position_embeddings
    if config.max_model_len is not None and not 2 <= config.max_model_len <= context:
        raise ValueError(f"max_model_len must be in 2..{context}, got {config.max_model_len}")
    max_model_len = config.max_model_len or context
    num_blocks = config.kv_cache_blocks or affordable_blocks(model, config.block_size, max_model_len, config.max_num_seqs)
    blocks = BlockManager(max(num_blocks, 2), config.block_size)
    if blocks.blocks_for(max_model_len) >= num_blocks:
        raise ValueError(
            f"the KV cache of {num_blocks} blocks of {config.block_size} tokens cannot hold one sequence of {max_model_len}; "
            "lower max_model_len or give the cache more blocks"
        )
    weight = model.model.embed_tokens.weight
    kv_cache = KVCache.allocate(model.config, num_blocks, config.block_size, weight.dtype, weight.device)
    table = PolicyTable(model.config, config.max_policies + 1, weight.device)
    limits = EngineLimits(
        max_model_len, config.max_num_seqs, num_blocks, config.block_size, model.config.vocab_size, config.max_policies
    )
    scheduler = Scheduler(
        blocks, config.max_num_seqs, config.max_step_tokens, max_model_len, prefix_caching=config.prefix_caching
    )
    eos = eos_token_ids(directory)
    return EngineCore(ModelRunner(model, kv_cache, table.tables, eos), scheduler, table, limits, eos)


def eos_token_ids(directory: Path) -> frozenset[int]:
    """End-of-text ids: generation_config.json's where it names them, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).exists():
            value = read_json(directory / name).get("eos_token_id")
            if value is not None:
                return frozenset(value if isinstance(value, list) else [value])
    return frozenset()
