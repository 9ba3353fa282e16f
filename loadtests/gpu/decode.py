"""Sections of the GPU suite: decoding with weights in 16 bits, in integers, and nested."""

import gc
import statistics
from functools import partial
from typing import Any

from ladimo.model.config import ModelConfig
from ladimo.model.quantization.layers import quantize_model
from ladimo.policy import LayerRule, RoutingPolicy
from ladimo.prefill.random_weights import random_model
from loadtests.common.limits import copy_bandwidth, decode_bytes
from loadtests.common.models import dense_config, random_nested_model
from loadtests.common.runs import interleaved, mean, random_prompts, serve, spread
from loadtests.gpu.bench import Bench

FORMATS: tuple[str | None, ...] = (None, "int8", "int4")


def decode(bench: Bench) -> None:
    """Batch 1: time per token by policy, compared to the time to read the necessary bytes at the measured copy bandwidth."""
    prompt, tokens = bench.size(128, 20), bench.size(129, 6)
    bandwidth = copy_bandwidth(bench.device)
    bench.notes |= {"copy_bandwidth_bytes_per_second": bandwidth, "prompt_tokens": prompt, "tokens": tokens}
    core = bench.core(bench.model(), 1, prompt + tokens + 16, prompt + tokens)
    prompts = random_prompts(1, prompt, bench.config.vocab_size)
    rows = {name: partial(serve, core, [policy], prompts, tokens) for name, policy in bench.policies().items()}
    samples = interleaved(rows, bench.size(5, 2))
    base = statistics.median(run.step_seconds for run in samples["all"])
    full_bytes = None
    for name, runs in samples.items():
        seconds = [run.step_seconds for run in runs]
        need = decode_bytes(bench.config, runs[-1].distinct, 1, prompt + tokens / 2, bench.dtype.itemsize)
        full_bytes = full_bytes or need
        middle = statistics.median(seconds)
        bench.row(
            policy=name,
            milliseconds=1000 * middle,
            spread_milliseconds=spread([1000 * value for value in seconds]),
            tokens_per_second=1 / middle,
            fraction_of_bandwidth=need / bandwidth / middle,
            speed_to_all=statistics.median(a.step_seconds / b.step_seconds for a, b in zip(samples["all"], runs, strict=True)),
            limit_to_all=full_bytes / need,
            distinct_experts=mean(runs[-1].distinct),
            wall_milliseconds=1000 * statistics.median(run.seconds / (tokens - 1) for run in runs),
        )
    bench.notes["goals"] = "all: fraction 0.85; half: speed 1.40; quarter: speed 1.75"
    dense = random_model(dense_config(bench.shape), bench.dtype, bench.device)
    dense_core = bench.core(dense, 1, prompt + tokens + 16, prompt + tokens)
    policy = RoutingPolicy("dense", "", (None,) * dense.config.num_hidden_layers)
    runs = interleaved({"dense": partial(serve, dense_core, [policy], prompts, tokens)}, bench.size(5, 2))["dense"]
    seconds = [run.step_seconds for run in runs]
    bench.row(
        policy="the dense model in the same engine",
        milliseconds=1000 * statistics.median(seconds),
        spread_milliseconds=spread([1000 * value for value in seconds]),
        speed_to_all=base / statistics.median(seconds),
    )


def integers(bench: Bench) -> None:
    """Batch 1: time per token by policy, with integer weights and with floating-point weights in the same process."""
    prompt, tokens = bench.size(128, 20), bench.size(65, 6)
    bandwidth = copy_bandwidth(bench.device)
    bench.notes |= {"copy_bandwidth_bytes_per_second": bandwidth, "prompt_tokens": prompt, "tokens": tokens}
    prompts = random_prompts(1, prompt, bench.config.vocab_size)
    policies = {name: policy for name, policy in bench.policies().items() if name in ("all", "quarter")}
    base: dict[str, float] = {}
    for format in FORMATS:
        model = bench.model()
        if format is not None:
            quantize_model(model, format)
        core = bench.core(model, 1, prompt + tokens + 16, prompt + tokens)
        rows = {name: partial(serve, core, [policy], prompts, tokens) for name, policy in policies.items()}
        # A scale has 32 bits for 32 weights, which is one more bit per weight.
        size = bench.dtype.itemsize if format is None else (int(format.removeprefix("int")) + 1) / 8
        for name, runs in interleaved(rows, bench.size(3, 2)).items():
            seconds = [run.step_seconds for run in runs]
            middle = statistics.median(seconds)
            base.setdefault(name, middle)
            need = decode_bytes(bench.config, runs[-1].distinct, 1, prompt + tokens / 2, bench.dtype.itemsize, size)
            bench.row(
                weights=format or "as they are",
                policy=name,
                milliseconds=1000 * middle,
                spread_milliseconds=spread([1000 * value for value in seconds]),
                tokens_per_second=1 / middle,
                fraction_of_bandwidth=need / bandwidth / middle,
                speed_to_as_they_are=base[name] / middle,
                distinct_experts=mean(runs[-1].distinct),
            )
        del model, core, rows
        gc.collect()


def nested(bench: Bench) -> None:
    """Nested weights, batches of 1, 8 and 32: time per decode step at each precision and mixed, compared to the dense model in
    16 bits and to the time to read the step's weights and cache at the measured copy bandwidth. Prefill by precision."""
    sizes = (1, 2) if bench.dry else (1, 8, 32)
    prompt, tokens = bench.size(128, 12), bench.size(33, 5)
    bandwidth = copy_bandwidth(bench.device)
    bench.notes |= {"copy_bandwidth_bytes_per_second": bandwidth, "prompt_tokens": prompt, "tokens": tokens}
    bench.notes["goals"] = "fraction 0.6 at 4 and 8 bits; mixed never slower than whole"
    model = random_nested_model(bench.shape, bench.dtype, bench.device)
    dense = random_model(dense_config(bench.shape), bench.dtype, bench.device)
    kv_size = model.config.num_key_value_heads * model.config.head_dim
    cache_bytes = 2 * model.config.num_hidden_layers * kv_size * (prompt + tokens / 2)
    policies = nested_policies(model.config)
    rows = {name: [policy] for name, policy in policies.items()}
    rows |= {"8 and 4 bits": [policies["8 bits"], policies["4 bits"]], "all four": list(policies.values())}
    for size in sizes:
        prompts = random_prompts(size, prompt, model.config.vocab_size)
        core = bench.core(model, size, prompt + tokens + 16, size * (prompt + tokens + 16))
        peer = bench.core(dense, size, prompt + tokens + 16, size * (prompt + tokens + 16))
        runs = {name: partial(serve, core, mix, prompts, tokens) for name, mix in rows.items() if len(mix) <= size}
        only = RoutingPolicy("dense", "", (None,) * dense.config.num_hidden_layers)
        samples = interleaved({"dense": partial(serve, peer, [only], prompts, tokens), **runs}, bench.size(3, 1))
        for name, measured in samples.items():
            seconds = [run.step_seconds for run in measured]
            middle = statistics.median(seconds)
            figures: dict[str, Any] = {}
            if name != "dense":
                weights = statistics.mean(step.weight_bytes for step in measured[-1].steps)
                need = weights + cache_bytes * size * bench.dtype.itemsize
                figures = {"weight_bytes": weights, "fraction_of_bandwidth": need / bandwidth / middle}
            bench.row(
                batch=size,
                policy=name,
                milliseconds=1000 * middle,
                spread_milliseconds=spread([1000 * value for value in seconds]),
                tokens_per_second=size / middle,
                speed_to_dense=statistics.median(run.step_seconds for run in samples["dense"]) / middle,
                prefill_tokens_per_second=size * prompt / statistics.median(run.prefill_seconds for run in measured),
                **figures,
            )


def nested_policies(config: ModelConfig) -> dict[str, RoutingPolicy]:
    """Policies of nested weights: one per precision, and one that refines neurons and words."""

    def policy(name: str, bits: int | None, refine: float | None = None, head_refine: float | None = None) -> RoutingPolicy:
        rule = LayerRule(1, renormalize=False, bits=bits, attention_bits=bits, refine=refine)
        return RoutingPolicy(name, "", (rule,) * config.num_hidden_layers, bits, head_refine)

    policies = (policy("whole", None), policy("8 bits", 8), policy("4 bits", 4), policy("refined", 4, 1.5, 8.0))
    return {one.name: one for one in policies}
