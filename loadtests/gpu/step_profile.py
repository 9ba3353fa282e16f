"""A section of the GPU suite: the kernels of a decode step, by their share of its time."""

import gc
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from ladimo.model.transformer import MoeTransformer
from ladimo.policy import RoutingPolicy
from ladimo.prefill.random_weights import random_model
from loadtests.common.models import dense_config, random_nested_model
from loadtests.common.runs import random_prompts
from loadtests.gpu.bench import Bench
from loadtests.gpu.decode import nested_policies
from server.engine.core import EngineCore
from server.engine.messages import Submit
from server.engine.request import GenerationRequest, SamplingParams

MOST_ROWS = 14  # kernels in the table of one step


def step_profile(bench: Bench) -> None:
    """Where the time of a decode step goes: the step, the time in kernels, and for each kernel its calls and its time."""
    batches = (1, 2) if bench.dry else (1, 32)
    prompt, tokens = bench.size(128, 12), bench.size(25, 6)
    for kind, model, policies in _models(bench):
        for batch in batches:
            core = bench.core(model, batch, prompt + tokens + 16, batch * (prompt + tokens + 16))
            for name, policy in policies.items():
                _profile(bench, core, batch, f"{kind}, {name}", policy, prompt, tokens)
        del model
        gc.collect()


def _models(bench: Bench) -> Iterator[tuple[str, MoeTransformer, dict[str, RoutingPolicy]]]:
    model = bench.model()
    yield "experts", model, {name: policy for name, policy in bench.policies().items() if name in ("all", "quarter")}
    del model
    dense = random_model(dense_config(bench.shape), bench.dtype, bench.device)
    yield "dense", dense, {"dense": RoutingPolicy("dense", "", (None,) * dense.config.num_hidden_layers)}
    del dense
    model = random_nested_model(bench.shape, bench.dtype, bench.device)
    yield "nested", model, nested_policies(model.config)


def _profile(bench: Bench, core: EngineCore, batch: int, case: str, policy: RoutingPolicy, prompt: int, tokens: int) -> None:
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for index, one in enumerate(random_prompts(batch, prompt, bench.config.vocab_size)):
        core.handle(Submit(GenerationRequest(f"r{index}", tuple(one), sampling, policy)))
    while core.has_work and core.step().stats.decode_tokens < batch:
        pass
    steps = tokens - 5
    with profiler(activities=[ProfilerActivity.CPU if bench.dry else ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            core.step()
        if not bench.dry:
            torch.cuda.synchronize()
    while core.has_work:
        core.step()
    kernels: dict[str, list[float]] = {}
    events = [event for event in found.events() if event.device_type.name == bench.device.type.upper()]
    spans = [(event.time_range.start, event.time_range.end, event.name) for event in events]
    for begin, end, name in spans:
        kernels.setdefault(name, []).append(end - begin)
    if not spans:
        bench.row(batch=batch, case=case, note="the profiler saw no kernel")
        return
    total = max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans)
    busy = sum(map(sum, kernels.values()))
    bench.row(
        batch=batch, case=case, step_microseconds=total / steps, busy_microseconds=busy / steps, kernels=len(spans) / steps
    )
    largest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:MOST_ROWS]
    for name, times in largest:
        bench.row(
            batch=batch,
            case=case,
            kernel=name[:70],
            calls=len(times) / steps,
            microseconds=sum(times) / steps,
            share=sum(times) / busy,
        )
