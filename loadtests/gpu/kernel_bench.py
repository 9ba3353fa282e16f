"""Compares each kernel to the hardware's limits, by tokens and experts per token. The limits are measured in the same run.

    python -m loadtests.gpu.kernel_bench [--experts 8] [--sweep]        on a GPU, about two minutes
    python -m loadtests.gpu.kernel_bench --dry-run                      in Triton's interpreter; its figures mean nothing

Sizes are those of one layer of LLaMA-2-7B in bf16, with the FFN divided into equal experts. Calls are timed inside a CUDA
graph, so launches do not count. They use several copies of the weights in turn, so the L2 cache does not help. The bound of a
call is the larger of two times: its necessary bytes divided by the copy bandwidth, and its operations divided by the matrix
rate. `dense` is the whole FFN in torch. Rows marked int8 and int4 read integer weights; their bytes are those of integers and
scales. Rows marked nested read nested weights. --sweep tries other tiles for the expert kernels.
"""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.config import MoeLayerConfig
from ladimo.model.inputs import RoutingTables
from ladimo.model.quantization import Weights, quantize_weights
from ladimo.policy import LayerRule, RoutingPolicy
from loadtests.common.conditions import conditions
from loadtests.common.limits import copy_bandwidth, matrix_rate, seconds_of
from loadtests.gpu.nested_kernels import KINDS, nested_calls

FORMATS: tuple[str, ...] = ("int8", "int4")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a layer, and the numbers of tokens, experts per token, sequences and positions to measure."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    heads: int = 32
    head_dim: int = 128
    copies: int = 4
    decode: tuple[int, ...] = (1, 2, 5, 16, 32, 64, 256)
    prefill: tuple[int, ...] = (2048, 8192)
    nested: tuple[int, ...] = (1, 8, 32, 2048)
    batches: tuple[int, ...] = (1, 16, 64)
    contexts: tuple[int, ...] = (512, 4096)


TINY = Sizes(64, 128, 4, 16, copies=2, decode=(1, 3), prefill=(20,), nested=(1,), batches=(2,), contexts=(40,))


@dataclass(frozen=True)
class Result:
    """One call. `bytes_moved` and `operations` are the minimum that the result needs. `dense` is the time of the dense FFN
    divided by the time of this call."""

    kernel: str
    case: str
    seconds: float
    bytes_moved: float
    operations: float
    dense: float | None = None


def seconds_per_call(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> float:
    """Mean seconds per call. The calls run one after another, and the whole sequence runs `repeats` times."""
    if device.type != "cuda":
        return seconds_of(lambda: [call() for call in calls], device, rounds=1) / len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in [*calls] * repeats:
            call()
    return seconds_of(graph.replay, device) / (repeats * len(calls))


class Bench:
    def __init__(self, sizes: Sizes, num_experts: int, device: torch.device, deadline: float) -> None:
        self.sizes, self.num_experts, self.device, self.deadline = sizes, num_experts, device, deadline
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.generator = torch.Generator(device).manual_seed(0)
        self.results: list[Result] = []
        self.bandwidth = copy_bandwidth(device)
        self.matrix_rate = matrix_rate(device, self.dtype)
        size, hidden = sizes.intermediate_size // num_experts, sizes.hidden_size
        self.weights = [
            (self.normal(num_experts, 2 * size, hidden) / hidden**0.5, self.normal(num_experts, hidden, size) / size**0.5)
            for _ in range(sizes.copies)
        ]
        self.integers: dict[str, list[tuple[Weights, Weights]]] = {}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype, generator=self.generator)

    def route(self, num_tokens: int, top_k: int) -> tuple[Tensor, Tensor]:
        """Random different experts for each token, each with weight 1: topk_weights and topk_ids."""
        ids = torch.rand(num_tokens, self.num_experts, device=self.device, generator=self.generator).argsort(dim=-1)
        ids[:, top_k:] = -1
        return (ids >= 0).float(), ids

    def bound(self, result: Result) -> float:
        return max(result.bytes_moved / self.bandwidth, result.operations / self.matrix_rate)

    def add(self, result: Result) -> None:
        self.results.append(result)
        ratio = "" if result.dense is None else f"{result.dense:8.2f}x"
        print(
            f"{result.kernel:<22} {result.case:<30} {result.seconds * 1e6:10.1f} us "
            f"{result.bytes_moved / result.seconds / 1e9:9.0f} GB/s {result.operations / result.seconds / 1e12:8.1f} TFLOP/s "
            f"{self.bound(result) / result.seconds:7.1%} {ratio}",
            flush=True,
        )

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def experts(
        self, num_tokens: int, top_k: int, dense_seconds: float, tiles: Any = None, format: str | None = None
    ) -> Result:
        from ladimo.model.kernels.experts import apply_experts

        x = self.normal(num_tokens, self.sizes.hidden_size)
        arguments = [(x, *self.route(num_tokens, top_k), *pair) for pair in self.stored(format)]
        calls = [partial(apply_experts, *a, tiles) for a in arguments]
        seconds = seconds_per_call(calls, self.device, repeats=4 if num_tokens <= 256 else 1)
        size, hidden = self.sizes.intermediate_size // self.num_experts, self.sizes.hidden_size
        distinct = sum(len(set(a[2].unique().tolist()) - {-1}) for a in arguments) / len(arguments)
        gate_up, down = arguments[0][3:]
        bytes_moved = distinct * (gate_up.nbytes + down.nbytes) / self.num_experts + 2 * x.nbytes
        operations = 2 * 3 * hidden * size * num_tokens * top_k
        case = f"T {num_tokens}, k {top_k}, {distinct:.1f} distinct"
        name = "experts" if format is None else f"experts, {format}"
        return Result(name, case, seconds, bytes_moved, operations, dense_seconds / seconds)

    def stored(self, format: str | None) -> list[tuple[Weights, Weights]]:
        """Copies of the experts' weights, as they are (None) or rounded to an integer format."""
        if format is None:
            return [*self.weights]
        if format not in self.integers:
            self.integers[format] = [
                (quantize_weights(gate_up, format), quantize_weights(down, format)) for gate_up, down in self.weights
            ]
        return self.integers[format]

    def linear(self, num_rows: int, format: str | None) -> Result:
        """A square linear layer: with integer weights, or torch's product (None)."""
        from ladimo.model.kernels.linear import linear

        hidden = self.sizes.hidden_size
        x = self.normal(num_rows, hidden)
        whole = [self.normal(hidden, hidden) / hidden**0.5 for _ in range(4 * self.sizes.copies)]
        weights: list[Weights] = [*whole] if format is None else [quantize_weights(one, format) for one in whole]
        calls = [partial(F.linear, x, one) if isinstance(one, Tensor) else partial(linear, x, one) for one in weights]
        seconds = seconds_per_call(calls, self.device, repeats=4)
        bytes_moved = weights[0].nbytes + 2 * x.nbytes
        name = "linear (torch)" if format is None else f"linear, {format}"
        return Result(name, f"T {num_rows}, {hidden} x {hidden}", seconds, bytes_moved, 2 * hidden * hidden * num_rows)

    def nested(self, num_tokens: int, kind: str) -> Iterator[Result]:
        """A linear layer and an FFN with nested weights."""
        dense = self.dense(num_tokens).seconds
        x = self.normal(num_tokens, self.sizes.hidden_size)
        for case in nested_calls(x, self.sizes.intermediate_size, self.sizes.copies, kind):
            seconds = seconds_per_call(case.calls, self.device, repeats=4 if num_tokens <= 256 else 1)
            ratio = dense / seconds if "FFN" in case.kernel else None
            yield Result(case.kernel, case.case, seconds, case.bytes_moved, case.operations, ratio)

    def dense(self, num_tokens: int) -> Result:
        """The dense FFN in torch with the same weights, and gate and up in one product."""
        x = self.normal(num_tokens, self.sizes.hidden_size)
        pairs = [(gate_up.flatten(0, 1), down.transpose(0, 1).flatten(1)) for gate_up, down in self.weights]

        def ffn(gate_up: Tensor, down: Tensor) -> Tensor:
            gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
            return F.linear(F.silu(gate) * up, down)

        calls = [partial(ffn, *pair) for pair in pairs]
        seconds = seconds_per_call(calls, self.device, repeats=4 if num_tokens <= 256 else 1)
        parameters = 3 * self.sizes.hidden_size * self.sizes.intermediate_size
        bytes_moved = (parameters + 2 * num_tokens * self.sizes.hidden_size) * self.dtype.itemsize
        return Result("dense FFN (torch)", f"T {num_tokens}", seconds, bytes_moved, 2 * parameters * num_tokens, 1.0)

    def library_grouped(self, num_tokens: int, top_k: int, dense_seconds: float) -> Result | None:
        """torch's grouped matrix products, on tokens that are sorted by expert already. A bound for kernels that sort first."""
        if self.device.type != "cuda" or not hasattr(torch, "_grouped_mm"):
            return None
        pairs = num_tokens * top_k
        x = self.normal(pairs, self.sizes.hidden_size)
        size, hidden = self.sizes.intermediate_size // self.num_experts, self.sizes.hidden_size
        ends = torch.arange(1, self.num_experts + 1, device=self.device, dtype=torch.int32) * (pairs // self.num_experts)

        def ffn(gate_up: Tensor, down: Tensor) -> Tensor:
            gate, up = torch._grouped_mm(x, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
            return torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)

        try:
            seconds = seconds_of(lambda: [ffn(*pair) for pair in self.weights], self.device) / len(self.weights)
        except RuntimeError as error:
            print(f"torch._grouped_mm: {str(error).splitlines()[0]}")
            return None
        operations = 2 * 3 * hidden * size * pairs
        return Result("torch._grouped_mm", f"T {num_tokens}, k {top_k}", seconds, 0, operations, dense_seconds / seconds)

    def attention(self, batch: int, context: int, kv_heads: int) -> Result:
        from ladimo.model.kernels.attention import attend_decode

        block_size = 16
        width = -(-context // block_size)
        heads, head_dim = self.sizes.heads, self.sizes.head_dim
        table = (torch.randperm(batch * width, device=self.device, generator=self.generator) + 1).view(batch, width)
        q = self.normal(batch, heads, head_dim)
        context_lens = torch.full((batch,), context, device=self.device)
        shape = (batch * width + 1, block_size, kv_heads, head_dim)
        caches = [(self.normal(*shape), self.normal(*shape)) for _ in range(self.sizes.copies)]
        calls = [partial(attend_decode, q, k, v, table, context_lens) for k, v in caches]
        seconds = seconds_per_call(calls, self.device, repeats=4)
        keys = batch * context * kv_heads * head_dim
        operations = 4 * batch * context * heads * head_dim
        case = f"B {batch}, context {context}, {heads}/{kv_heads} heads"
        return Result("attend_decode", case, seconds, 2 * keys * self.dtype.itemsize, operations)

    def small(self, num_tokens: int) -> Iterator[Result]:
        """The small kernels. With one token, launches take most of their time; with many tokens, memory does."""
        from ladimo.model.kernels import attention, norm_activation, routing

        hidden, width = self.sizes.hidden_size, self.sizes.intermediate_size
        heads, head_dim = self.sizes.heads, self.sizes.head_dim
        x, residual, weight = self.normal(num_tokens, hidden), self.normal(num_tokens, hidden), self.normal(hidden)
        gate, up = self.normal(num_tokens, width), self.normal(num_tokens, width)
        logits = self.normal(num_tokens, self.num_experts)
        numbers, _ = RoutingPolicy("top2", "", (LayerRule(2),)).to_rows(self.num_experts)
        rows = torch.tensor(numbers[:1], device=self.device).repeat(num_tokens, 1)
        allowed = torch.ones(num_tokens, self.num_experts, dtype=torch.bool, device=self.device)
        layer = MoeLayerConfig(self.num_experts, 2, width // self.num_experts)
        ids = self.route(num_tokens, 2)[1].expand(32, -1, -1).contiguous()
        tables = RoutingTables.empty(4, 32, self.num_experts, self.device)
        policy_ids = torch.ones(num_tokens, dtype=torch.int64, device=self.device)
        q, k, v = (self.normal(num_tokens, heads, head_dim) for _ in range(3))
        rope = self.normal(num_tokens, 1, head_dim), self.normal(num_tokens, 1, head_dim)
        caches = self.normal(num_tokens, 1, heads, head_dim), self.normal(num_tokens, 1, heads, head_dim)
        slots = torch.arange(num_tokens, device=self.device)
        row = hidden * num_tokens * self.dtype.itemsize
        calls: dict[str, tuple[Callable[[], object], float]] = {
            "add_rms_norm": (lambda: norm_activation.add_rms_norm(x, residual, weight, 1e-5), 4 * row),
            "silu_mul": (lambda: norm_activation.silu_mul(gate, up), 3 * gate.nbytes),
            "rotate_and_store": (lambda: attention.rotate_and_store(q, k, v, rope, *caches, slots), 6 * row),
            "select_experts": (lambda: routing.select_experts(logits, rows, allowed, layer), 4 * ids[0].nbytes),
            "record, 32 layers": (
                lambda: routing.record(ids, policy_ids, tables.expert_tokens, tables.distinct_experts),
                ids.nbytes,
            ),
        }
        for name, (call, bytes_moved) in calls.items():
            yield Result(name, f"T {num_tokens}", seconds_per_call([call], self.device, repeats=20), bytes_moved, 0)


def candidate_tiles(num_tokens: int) -> Iterator[tuple[Any, Any]]:
    """Pairs of tiles for `apply_experts`. In each pair, one tile differs from the present choice."""
    from ladimo.model.kernels.expert_grouped import grouped_tiles
    from ladimo.model.kernels.expert_matvec import MATVEC_TILES
    from ladimo.model.kernels.tiles import Tile

    if num_tokens == 1:
        first, second = MATVEC_TILES
        tried = [Tile(1, n, k, warps) for n, k, warps in itertools.product((2, 4, 8), (512, 1024, 2048), (4, 8))]
    else:
        first, second = grouped_tiles(num_tokens)
        sizes = itertools.product((first.m, 2 * first.m), (16, 32, 64, 128), (64, 128), (4, 8), (3, 4, 5))
        tried = [Tile(*size) for size in sizes if size[0] <= 128 and abs(size[1] - first.n) <= 64]
    yield first, second
    for tile in tried:
        yield tile, second
        yield first, tile


def sweep(bench: Bench, num_tokens: int, top_k: int, dense_seconds: float) -> None:
    """Print the three fastest pairs of tiles, and the present one."""
    found = []
    for tiles in candidate_tiles(num_tokens):
        if bench.out_of_time:
            break
        try:
            found.append((bench.experts(num_tokens, top_k, dense_seconds, tiles), tiles))
        except Exception as error:  # the tile does not fit the machine
            print(f"{tiles}: {str(error).splitlines()[0][:120]}")
    present = found[0]
    for result, tiles in [present, *sorted(found, key=lambda pair: pair[0].seconds)[:3]]:
        bench.add(result)
        print(f"    {tiles[0]}, {tiles[1]}")


def measure(bench: Bench, sweeping: bool) -> None:
    sizes = bench.sizes
    every = bench.num_experts
    for num_tokens in (*sizes.decode, *sizes.prefill):
        dense = bench.dense(num_tokens)
        bench.add(dense)
        for top_k in sorted({1, 2, every // 2, every}):
            if bench.out_of_time:
                return
            bench.add(bench.experts(num_tokens, top_k, dense.seconds))
            if num_tokens in sizes.prefill and (library := bench.library_grouped(num_tokens, top_k, dense.seconds)):
                bench.add(library)
        if sweeping:
            sweep(bench, num_tokens, 2, dense.seconds)
            sweep(bench, num_tokens, every, dense.seconds)
    for batch, context, kv_heads in itertools.product(sizes.batches, sizes.contexts, (sizes.heads, sizes.heads // 4)):
        if bench.out_of_time:
            return
        bench.add(bench.attention(batch, context, kv_heads))
    for num_tokens in (1, sizes.decode[-1], sizes.prefill[0]):
        for result in bench.small(num_tokens):
            bench.add(result)
    measure_integers(bench)
    for num_tokens, kind in itertools.product(sizes.nested, KINDS):
        if bench.out_of_time:
            return
        for result in bench.nested(num_tokens, kind):
            bench.add(result)


def measure_integers(bench: Bench) -> None:
    """Integer weights: decode steps, which read fewer bytes, and prompts, which pay for unpacking."""
    sizes = bench.sizes
    for num_tokens in sorted({1, sizes.decode[len(sizes.decode) // 2], sizes.decode[-1], sizes.prefill[0]}):
        dense = bench.dense(num_tokens)
        for format, top_k in itertools.product(FORMATS, (2, bench.num_experts)):
            if bench.out_of_time:
                return
            bench.add(bench.experts(num_tokens, top_k, dense.seconds, format=format))
        for weights in (None, *FORMATS):
            bench.add(bench.linear(num_tokens, weights))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=100.0, help="begin no measurement after this time")
    parser.add_argument("--sweep", action="store_true", help="try other tiles; give it more --seconds")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed")
    if args.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads the variable when it is first imported. This process may have imported it already.
        given = [*(sys.argv[1:] if argv is None else argv)]
        command = [sys.executable, "-m", "loadtests.gpu.kernel_bench", *given]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    device = torch.device("cpu" if args.dry_run else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU; use --dry-run")
    with torch.inference_mode():
        bench = Bench(TINY if args.dry_run else Sizes(), args.experts, device, time.monotonic() + args.seconds)
        print(f"copy {bench.bandwidth / 1e9:.0f} GB/s, matrix product {bench.matrix_rate / 1e12:.1f} TFLOP/s")
        print(f"{'':<53} {'time':>13} {'bytes':>14} {'operations':>16} {'bound':>7} {'dense/this':>9}")
        measure(bench, args.sweep)
    record = {
        "benchmark": "kernel_bench",
        "dry_run": args.dry_run,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "experts": args.experts,
        "copy_bytes_per_second": bench.bandwidth,
        "matrix_flops_per_second": bench.matrix_rate,
        "results": [{**asdict(result), "of_bound": bench.bound(result) / result.seconds} for result in bench.results],
        **conditions(),
    }
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
