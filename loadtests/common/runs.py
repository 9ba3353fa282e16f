"""Runs batches of requests through an engine core and measures them. There is no HTTP and no other thread."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ladimo.policy import RoutingPolicy
from server.engine.core import EngineCore
from server.engine.messages import ExpertSnapshot, ReadExperts, StepStats, Submit
from server.engine.request import GenerationRequest, SamplingParams


@dataclass(frozen=True)
class Run:
    """The measurements of one batch of requests.

    steps: the steps in which all requests decoded, and nothing else. seconds: the time after the first tokens.
    prefill_seconds: the time until every prompt had its first token. distinct: the mean number of different experts per decode
    step, by layer.
    """

    seconds: float
    prefill_seconds: float
    steps: list[StepStats]
    distinct: list[float | None]

    @property
    def step_seconds(self) -> float:
        return statistics.median(step.seconds for step in self.steps)


def serve(core: EngineCore, policies: Sequence[RoutingPolicy], prompts: list[list[int]], tokens: int) -> Run:
    """Generate `tokens` tokens for each prompt. Prompt i runs under policies[i % n]."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        core.handle(Submit(GenerationRequest(f"r{index}", tuple(prompt), sampling, policies[index % len(policies)])))
    steps: list[StepStats] = []
    before: list[list[int]] = []
    started, first, begun, prefilled = time.perf_counter(), None, 0, 0.0
    while core.has_work:
        stats = core.step().stats
        now = time.perf_counter()
        begun += len(stats.first_token_seconds)
        if first is None and begun:
            first = now
        if stats.first_token_seconds and begun == len(prompts):
            prefilled = now - started
            before = distinct_histogram(core)
        steps.append(stats)
    assert first is not None
    pure = [step for step in steps if step.decode_tokens == len(prompts) and not step.prefill_tokens]
    return Run(time.perf_counter() - first, prefilled, pure, mean_distinct(before, distinct_histogram(core)))


def distinct_histogram(core: EngineCore) -> list[list[int]]:
    snapshot = core.handle(ReadExperts(0))
    assert isinstance(snapshot, ExpertSnapshot)
    return snapshot.distinct_experts


def mean_distinct(before: list[list[int]], after: list[list[int]]) -> list[float | None]:
    """The mean number of different experts per step, by layer; None for a dense layer."""
    means: list[float | None] = []
    for old, new in zip(before, after, strict=True):
        steps = [b - a for a, b in zip(old, new, strict=True)]
        means.append(sum(n * count for n, count in enumerate(steps)) / sum(steps) if sum(steps) else None)
    return means


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def random_prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(vocab_size, (count, length), generator=generator).tolist()
    return prompts


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.4g}-{max(values):.4g}"


def interleaved(rows: Mapping[str, Callable[[], Run]], rounds: int) -> dict[str, list[Run]]:
    """Run each row once per round, in turn. The first round is a warm-up and does not count."""
    for run in rows.values():
        run()
    samples: dict[str, list[Run]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, run in rows.items():
            samples[name].append(run())
    return samples
