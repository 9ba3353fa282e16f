"""All checks and measurements that need a GPU, in one command: the gpu tests, the kernels, and the engine at a real shape.

    python -m loadtests.gpu_suite --out results [--only decode,prefill] [--seconds 480]
    python -m loadtests.gpu_suite --dry-run

Each section runs in its own process with a time limit. If a section fails, hangs or corrupts the device, the other sections are
not lost, and the results that it had by then are kept. Every section prints a table and then one JSON line, which is also
written to OUT/<section>.json. The model has the shape of LLaMA-2-7B (see --shape), random weights in bf16 made on the device,
and 8 experts per layer, which partition the FFN and count with weight 1. --dry-run runs all sections on a CPU at tiny sizes, to
check that they work. Its figures mean nothing.

The file is long because it has one section per measurement, and all sections use the same bench.
"""

import argparse
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ladimo.model.config import ModelConfig
from ladimo.model.inputs import RoutingTables
from ladimo.model.quantized_layers import quantize_model
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import LayerRule, RoutingPolicy
from loadtests.common.conditions import conditions
from loadtests.common.limits import copy_bandwidth, decode_bytes, matrix_rate, seconds_of
from loadtests.common.models import SHAPES, dense_config, partitioned_config, random_model, random_nested_model, top_k_policy
from loadtests.common.runs import Run, interleaved, mean, random_prompts, serve, spread
from server.engine.config import EngineConfig
from server.engine.core import EngineCore, assemble_core
from server.engine.graphs.cuda_graphs import CudaGraphs, DecodeGraphs, Rerun
from server.engine.messages import Activate, StepStats, Submit
from server.engine.request import GenerationRequest, SamplingParams

ROOT = Path(__file__).parent.parent
FORMATS: tuple[str | None, ...] = (None, "int8", "int4")
DRY_LIMIT = 240  # seconds per section of a dry run
LEAST_SECONDS = 10.0


@dataclass
class Bench:
    """The settings of one section, and its results so far."""

    name: str
    out: Path
    shape: str
    dry: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    @property
    def config(self) -> ModelConfig:
        return partitioned_config(self.shape)

    def size(self, real: int, dry: int) -> int:
        return dry if self.dry else real

    def row(self, **figures: Any) -> None:
        """Print a row of the table, and save all results so far to disk."""
        self.rows.append(figures)
        print(
            "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
            )
        )
        sys.stdout.flush()
        self.save()

    def save(self) -> dict[str, Any]:
        record = {
            "benchmark": f"gpu_suite {self.name}",
            "shape": self.shape,
            "dtype": str(self.dtype).removeprefix("torch."),
            "dry_run": self.dry,
            **self.notes,
            "results": self.rows,
            **conditions(),
        }
        (self.out / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return record

    def model(self) -> MoeTransformer:
        return random_model(self.config, self.dtype, self.device)

    def core(
        self, model: MoeTransformer, max_num_seqs: int, max_model_len: int, tokens: int, step_tokens: int = 8192
    ) -> EngineCore:
        """An engine with a KV cache for `tokens` tokens. It has graphs for few batch sizes only, because captures take time."""
        block_size = 16
        blocks = max(-(-tokens // block_size) + max_num_seqs, -(-max_model_len // block_size)) + 2
        sizes = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            kv_cache_blocks=blocks,
            block_size=block_size,
            max_step_tokens=step_tokens,
            prefix_caching=False,  # all rounds must do the same work
        )
        buckets = tuple(sorted({size for size in (1, 8, 32, 64, 256) if size < max_num_seqs} | {max_num_seqs}))
        return assemble_core(model, sizes, capturer=Rerun() if self.dry else None, buckets=buckets)

    def policies(self) -> dict[str, RoutingPolicy]:
        """Policies in which all, a half or a quarter of the FFN is active by routing, and one with a fixed quarter of the
        experts."""
        config = self.config
        return {
            "all": top_k_policy(config, "all", 8),
            "half": top_k_policy(config, "half", 4),
            "quarter": top_k_policy(config, "quarter", 2),
            "quarter fixed": top_k_policy(config, "quarter fixed", 2, experts=(0, 1)),
        }


def decode(bench: Bench) -> None:
    """Batch 1: time per token by policy, compared to the time to read the necessary bytes at the measured copy bandwidth."""
    prompt, tokens = bench.size(128, 20), bench.size(129, 6)
    bandwidth = copy_bandwidth(bench.device)
    bench.notes |= {"copy_bandwidth_bytes_per_second": bandwidth, "prompt_tokens": prompt, "tokens": tokens}
    core = bench.core(bench.model(), 1, prompt + tokens + 16, prompt + tokens)
    prompts = random_prompts(1, prompt, bench.config.vocab_size)
    rows = {name: partial(serve, core, [policy], prompts, tokens) for name, policy in bench.policies().items()}
    samples = interleaved(rows, bench.size(7, 2))
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


def kernels(bench: Bench) -> None:
    """Each kernel compared to the limits of the hardware. Runs `loadtests.kernel_bench`."""
    command = [sys.executable, "-m", "loadtests.kernel_bench", *(["--dry-run"] if bench.dry else [])]
    last = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for last in process.stdout:
            print(last, end="", flush=True)
    if process.returncode:
        raise RuntimeError(f"kernel_bench ended with {process.returncode}")
    bench.rows = json.loads(last)["results"]


def gpu_tests(bench: Bench) -> None:
    """Run the tests with the marker gpu. A dry run only collects them."""
    command = [sys.executable, "-m", "pytest", "-q", "-c", "tests/gpu/pytest.ini", "--rootdir", ".", "--confcutdir", "."]
    command += ["-p", "no:cacheprovider", "-m", "gpu", "tests/gpu", *(["--collect-only"] if bench.dry else ["--tb=short"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (bench.out / "tests.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    print(done.stdout[-6000:])
    summary = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-1:]
    bench.row(exit_code=done.returncode, summary=" ".join(summary))
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}; see tests.log")


# In the order of execution, each with its time limit in seconds.
SECTIONS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "decode": (decode, 80),
    "integers": (integers, 50),
    "nested": (nested, 90),
    "prefill": (prefill, 60),
    "swap": (swap, 45),
    "counting": (counting, 60),
    "batches": (batches, 130),
    "tests": (gpu_tests, 120),
    "kernels": (kernels, 135),
}


def run_section(bench: Bench, measure: Callable[[Bench], None]) -> None:
    """Run a section in this process. What it had measured when it failed is kept."""
    started = time.perf_counter()
    try:
        measure(bench)
    except Exception as error:
        bench.notes["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        bench.notes["seconds"] = time.perf_counter() - started
        print(json.dumps(bench.save()), flush=True)
        gc.collect()


def run_all(
    commands: Mapping[str, list[str]], limits: Mapping[str, float], seconds: float, least: float = LEAST_SECONDS
) -> dict[str, str]:
    """Run each section in its own process. Returns the outcome of each by name.

    `limits`: the seconds that each may take; `seconds`: those that all may take together. A section does not begin with less
    than `least` seconds left.
    """
    started = time.monotonic()
    outcome: dict[str, str] = {}
    for name, command in commands.items():
        limit = min(limits[name], seconds - (time.monotonic() - started))
        if limit < least:
            outcome[name] = "skipped: no time left"
            continue
        print(f"\n== {name}", flush=True)
        begun = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
            outcome[name] = "ok" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            outcome[name] = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and all processes that it has started
                process.wait()
        outcome[name] += f" ({time.monotonic() - begun:.0f} s)"
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-suite"), help="directory of the JSON files")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--seconds", type=float, default=560.0, help="time limit of all sections together")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: llama-2-7b; in a dry run: tiny")
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU at tiny sizes")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    shape = args.shape or ("tiny" if args.dry_run else "llama-2-7b")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        run_section(Bench(args.section, args.out, shape, args.dry_run), SECTIONS[args.section][0])
        return 0
    names = [name for name in args.only.split(",") if name]
    if unknown := sorted(set(names) - set(SECTIONS)):
        parser.error(f"there is no section {unknown[0]!r}; sections: {', '.join(SECTIONS)}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run runs on CPU")
    flags = ["--out", str(args.out.resolve()), "--shape", shape, *(["--dry-run"] if args.dry_run else [])]
    commands = {name: [sys.executable, "-m", "loadtests.gpu_suite", "--section", name, *flags] for name in names}
    limits = {name: DRY_LIMIT if args.dry_run else SECTIONS[name][1] for name in names}
    outcome = run_all(commands, limits, math.inf if args.dry_run else args.seconds)
    print()
    for name, what in outcome.items():
        print(f"{name:<10} {what}")
    print(json.dumps({"benchmark": "gpu_suite", "dry_run": args.dry_run, "sections": outcome, **conditions()}))
    return int(any(not what.startswith("ok") for what in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
