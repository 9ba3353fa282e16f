"""Sections of the GPU suite: prefill, large batches, counting and swaps of policies."""

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ladimo.model.config import ModelConfig
from ladimo.model.inputs import RoutingTables
from ladimo.policy import LayerRule, RoutingPolicy
from loadtests.common.limits import copy_bandwidth, decode_bytes, matrix_rate, seconds_of
from loadtests.common.models import SHAPES
from loadtests.common.runs import Run, interleaved, mean, random_prompts, serve, spread
from loadtests.gpu.bench import Bench
from server.engine.graphs.cuda_graphs import CudaGraphs, DecodeGraphs, Rerun
from server.engine.messages import Activate, StepStats, Submit
from server.engine.request import GenerationRequest, SamplingParams


def prefill(bench: Bench) -> None:
    """8 prompts of 2048 tokens: prompt tokens per second by policy."""
    count, length = bench.size(8, 2), bench.size(2048, 40)
    rate = matrix_rate(bench.device, bench.dtype)
    bench.notes |= {"matrix_flops": rate, "prompts": count, "prompt_tokens": length, "goals": "quarter: 1.6 times all"}
    core = bench.core(bench.model(), count, length + 16, count * (length + 16), step_tokens=count * length)
    prompts = random_prompts(count, length, bench.config.vocab_size)
    rows = {name: partial(serve, core, [policy], prompts, 2) for name, policy in bench.policies().items()}
    samples = interleaved(rows, bench.size(5, 2))
    for name, runs in samples.items():
        seconds = [run.prefill_seconds for run in runs]
        experts = tuple(8.0 if name == "all" else 4.0 if name == "half" else 2.0 for _ in bench.config.layers)
        flops = 2 * count * length * bench.config.active_parameters_ratio(experts) * bench.config.dense_parameters
        bench.row(
            policy=name,
            tokens_per_second=count * length / statistics.median(seconds),
            seconds=statistics.median(seconds),
            spread_seconds=spread(seconds),
            fraction_of_matrix_rate=flops / rate / statistics.median(seconds),
            speed_to_all=statistics.median(
                a.prefill_seconds / b.prefill_seconds for a, b in zip(samples["all"], runs, strict=True)
            ),
        )


def batches(bench: Bench) -> None:
    """Batches of 32, 64 and 256: tokens per second by policy, and of transformers' continuous batching on the dense model.

    Both are timed from the first token to the last. This includes the time of prompts that have to wait.
    """
    from loadtests.common.peers import Unavailable, continuous_batching, dense_llama

    sizes = (2, 3) if bench.dry else (32, 64, 256)
    prompt, tokens = bench.size(128, 12), bench.size(65, 5)
    bandwidth = copy_bandwidth(bench.device)
    bench.notes |= {"copy_bandwidth_bytes_per_second": bandwidth, "prompt_tokens": prompt, "tokens": tokens}
    bench.notes["goals"] = "2 times continuous batching of transformers"
    core = bench.core(bench.model(), max(sizes), prompt + tokens + 16, max(sizes) * (prompt + tokens + 16))
    policies = bench.policies()
    peer_of: dict[int, list[float]] = {size: [] for size in sizes}
    samples: dict[int, dict[str, list[Run]]] = {}
    for size in sizes:
        prompts = random_prompts(size, prompt, bench.config.vocab_size)
        rows = {name: partial(serve, core, [policy], prompts, tokens) for name, policy in policies.items()}
        rows["mixed"] = partial(serve, core, list(policies.values()), prompts, tokens)
        samples[size] = interleaved(rows, bench.size(2, 1))
        for name, runs in samples[size].items():
            report_batch(bench, size, name, runs, tokens, prompt, bandwidth)
    try:
        peer = continuous_batching(dense_llama(SHAPES[bench.shape], bench.dtype, bench.device))
        for _ in range(bench.size(3, 1)):  # the first round is a warm-up
            for size in sizes:
                prompts = random_prompts(size, prompt, bench.config.vocab_size)
                peer_of[size].append(peer(prompts, tokens))
    except Unavailable as reason:
        bench.notes["peer"] = f"skipped: {reason}"
    except Exception as error:  # an error of another library must not lose our figures
        bench.notes["peer"] = f"failed: {type(error).__name__}: {error}"
    if "peer" in bench.notes:
        print(f"transformers continuous batching: {bench.notes['peer']}")
    for size, seconds in peer_of.items():
        if len(seconds) > 1:
            middle = statistics.median(seconds[1:])
            ratios = {name: middle / statistics.median(run.seconds for run in runs) for name, runs in samples[size].items()}
            bench.row(
                batch=size,
                policy="transformers continuous batching, dense",
                tokens_per_second=size * tokens / middle,
                spread_seconds=spread(seconds[1:]),
                **{f"ratio {name}": ratio for name, ratio in ratios.items()},
            )


def report_batch(bench: Bench, size: int, name: str, runs: list[Run], tokens: int, prompt: int, bandwidth: float) -> None:
    seconds = [run.seconds for run in runs]
    steps = statistics.median(run.step_seconds for run in runs)
    need = decode_bytes(bench.config, runs[-1].distinct, size, prompt + tokens / 2, bench.dtype.itemsize)
    bench.row(
        batch=size,
        policy=name,
        tokens_per_second=size * tokens / statistics.median(seconds),
        spread_seconds=spread(seconds),
        decode_step_milliseconds=1000 * steps,
        decode_tokens_per_second=size / steps,
        fraction_of_bandwidth=need / bandwidth / steps,
        distinct_experts=mean(runs[-1].distinct),
    )


class Uncounted(RoutingTables):
    """Routing tables that do not count."""

    def record(self, expert_ids: torch.Tensor, policy_ids: torch.Tensor) -> None:
        pass


def counting(bench: Bench) -> None:
    """The cost of counting experts: the captured step with and without counting, in turn."""
    model = bench.model()
    sizes = (1, 2) if bench.dry else (1, 32, 256)
    bench.notes["goals"] = "share below 0.005"
    core = bench.core(model, max(sizes), 128, max(sizes) * 32)
    runner: Any = core._runner
    policy = bench.policies()["half"]
    rows = core._table.acquire([policy])
    assert rows is not None
    graphs = {
        counted: DecodeGraphs(
            model,
            runner.kv_cache,
            tables
            if counted
            else Uncounted(tables.rows, tables.allowed, tables.expert_tokens, tables.distinct_experts, tables.refined),
            8,
            sizes,
            Rerun() if bench.dry else CudaGraphs(bench.device),
        )
        for counted, tables in ((True, runner.tables), (False, runner.tables))
    }
    for size in sizes:
        for each in graphs.values():
            each.buffers.integers[3, :size] = rows[0]
        samples: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(bench.size(15, 3)):
            for counted, each in graphs.items():
                samples[counted].append(seconds_of(partial(each.replay_step, size), bench.device, rounds=bench.size(5, 1)))
        shares = [1 - without / with_ for with_, without in zip(samples[True], samples[False], strict=True)]
        bench.row(
            batch=size,
            step_milliseconds=1000 * statistics.median(samples[True]),
            uncounted_milliseconds=1000 * statistics.median(samples[False]),
            share=statistics.median(shares),
            spread_share=spread(shares),
        )


def swap(bench: Bench) -> None:
    """New policies become resident while a batch decodes: the time of the steps, and the number of new captures."""
    batch, prompt, tokens = bench.size(8, 2), bench.size(128, 12), bench.size(257, 25)
    every = bench.size(10, 4)
    bench.notes |= {"batch": batch, "swap_every_steps": every, "goals": "no capture, no step above 1.2 times the median"}
    core = bench.core(bench.model(), batch, prompt + tokens + 16, batch * (prompt + tokens + 16))
    prompts = random_prompts(batch, prompt, bench.config.vocab_size)
    fresh = fresh_policies(bench.config)
    serve(core, [bench.policies()["half"]], prompts, tokens)
    for swapping in (False, True, False, True):
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        for index, one in enumerate(prompts):
            core.handle(Submit(GenerationRequest(f"r{index}", tuple(one), sampling, bench.policies()["half"])))
        steps: list[StepStats] = []
        intervals: list[float] = []
        last = time.perf_counter()
        while core.has_work:
            if swapping and len(steps) % every == every - 1:
                core.handle(Activate(len(steps), (next(fresh), next(fresh))))
            steps.append(core.step().stats)
            now = time.perf_counter()
            if steps[-1].decode_tokens == batch and not steps[-1].prefill_tokens:
                intervals.append(now - last)
            last = now
        middle = statistics.median(intervals)
        bench.row(
            swapping=swapping,
            median_milliseconds=1000 * middle,
            longest_to_median=max(intervals) / middle,
            second_longest_to_median=sorted(intervals)[-2] / middle,
            captures=sum(step.cuda_graph_captures for step in steps),
            replays=sum(step.cuda_graph_bucket is not None for step in steps),
            steps=len(steps),
        )


def fresh_policies(config: ModelConfig) -> Iterator[RoutingPolicy]:
    """Policies that differ in one number, so each has a new version."""
    for number in range(10**6):
        rule = LayerRule(top_k=1 + number % 8, mass=1 + number / 10**6)
        yield RoutingPolicy(f"fresh {number}", "", tuple(None if layer is None else rule for layer in config.layers))
