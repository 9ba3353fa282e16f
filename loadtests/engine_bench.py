"""Speed of the engine by batch size and policy, and of other engines on the dense model in the same run.

    python -m loadtests.engine_bench models/demo --dense ladimo/demo/model [--batch 1,8] [--policies full,fast] [--dtype NAME]
    python -m loadtests.engine_bench --shape 125m [--quantize int8]

Rounds are interleaved: each round measures every row once. The figure of a row is the median of its rounds. Its ratio is the
median of its ratios per round to transformers' `generate` and to llama.cpp. Decode is measured from the first token on. Prefill
is the time from one prompt of --prefill tokens to its first token. With --shape the weights are random, and the experts
partition the FFN. An engine that cannot run here is left out, and the reason is printed. So is one that takes longer than
--peer-seconds in all, to load, to compile and to measure; rounds that it has completed stay.

Two columns compare with the machine. `bandwidth`: the bytes that a decode step must read, as a share of what torch reads
of a large tensor. `products`: the operations of a dense model's matrix products, as a share of torch's rate for a large product
in bf16 or fp32, whichever is faster. Integer products can be faster than that.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import choose_device, load_model, read_config, read_policies, stored_dtype
from ladimo.model.backends.choose import choose_backend
from ladimo.model.precision import bytes_per_weight
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import RoutingPolicy
from ladimo.prefill.random_weights import random_model
from loadtests.common import peers
from loadtests.common.conditions import OtherLoad, conditions
from loadtests.common.engine_process import PACKAGES, start_engine
from loadtests.common.limits import decode_bytes, matrix_rate, read_bandwidth
from loadtests.common.models import SHAPES, dense_config, partitioned_config, prepare_to_serve, top_k_policy
from loadtests.common.runs import mean, random_prompts, serve
from loadtests.common.time_limit import TimeLimit
from server.engine.build import assemble_core
from server.engine.config import EngineConfig
from server.engine.core import EngineCore

REFERENCE = "transformers generate, dense"
LLAMA_CPP = "llama.cpp, dense"
BUDGET = "half, the same for all"
PEERS = ("generate", "static", "continuous", "llama.cpp", *PACKAGES)
RowKey = tuple[str, int, str]  # measure, batch, name


@dataclass(frozen=True)
class Subjects:
    """The models to compare: the converted model under its policies, and the dense model in our engine and in transformers."""

    moe: MoeTransformer
    dense: MoeTransformer
    policies: dict[str, RoutingPolicy]
    dense_peer: Any


@dataclass(frozen=True)
class Sample:
    """Seconds of one round. `step_seconds` and `distinct` are only set when our engine decoded."""

    seconds: float
    step_seconds: float | None = None
    distinct: tuple[float | None, ...] | None = None


def read_subjects(model: Path, dense: Path, names: Sequence[str], dtype: torch.dtype, device: torch.device) -> Subjects:
    """Load the models. Raises ValueError for a policy that the checkpoint does not have."""
    known = read_policies(model, read_config(model))
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"{model}: there is no policy {missing[0]!r}; there are {', '.join(known)}")
    return Subjects(
        load_model(model, dtype, device),
        load_model(dense, dtype, device),
        {name: known[name] for name in names},
        AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).to(device).eval(),
    )


def random_subjects(shape: str, dtype: torch.dtype, device: torch.device) -> Subjects:
    config = partitioned_config(shape)
    return Subjects(
        random_model(config, dtype, device),
        random_model(dense_config(shape), dtype, device),
        {
            **{name: top_k_policy(config, name, top_k) for name, top_k in (("all", 8), ("half", 4), ("quarter", 2))},
            BUDGET: top_k_policy(config, BUDGET, 4, batch_experts=4),
        },
        peers.dense_llama(SHAPES[shape], dtype, device),
    )


@dataclass(frozen=True)
class Rival:
    """Another engine. Functions measure the seconds of a decode, and of a prefill if that is possible. `version`: package and
    release of an engine that has an environment of its own. `limit`: its time, which includes its start."""

    decode: peers.Peer
    prefill: Callable[[list[list[int]]], float] | None = None
    version: str | None = None
    limit: TimeLimit = field(default_factory=lambda: TimeLimit(math.inf))


def make_peers(names: Sequence[str], dense_peer: Any, args: argparse.Namespace) -> tuple[dict[str, Rival], dict[str, str]]:
    """The other engines by the name of their row, and for those that cannot run the reason."""
    made: dict[str, Rival] = {}
    missing: dict[str, str] = {}

    def llama_cpp(limit: TimeLimit) -> Rival:
        dtype = "F32" if dense_peer.dtype == torch.float32 else "BF16"
        weights = {None: dtype, "int8": "Q8_0", "int4": "Q4_0"}[args.quantize]
        context = max(args.prompt + args.tokens, args.prefill + 2)
        if dense_peer.device.type != "cpu":
            raise peers.Unavailable("llama.cpp is measured on CPU only")
        peer = peers.llama_cpp(dense_peer, weights, torch.get_num_threads(), max(batch_sizes(args)), context)
        return Rival(peer.decode, peer.prefill)

    def engine(name: str, limit: TimeLimit) -> Rival:
        options = {"sequences": max(batch_sizes(args)), "context": max(args.prompt + args.tokens, args.prefill + 2)}
        process = start_engine(name, args.environments, dense_peer, args.quantize, options, limit)
        return Rival(process.decode, process.prefill, process.version)

    makers: dict[str, tuple[str, Callable[[TimeLimit], Rival]]] = {
        "generate": (REFERENCE, lambda _: Rival(peers.generate(dense_peer), partial(peers.forward_seconds, dense_peer))),
        "static": ("transformers static cache, dense", lambda _: Rival(peers.static_cache(dense_peer))),
        "continuous": ("transformers continuous batching, dense", lambda _: Rival(peers.continuous_batching(dense_peer))),
        "llama.cpp": (LLAMA_CPP, llama_cpp),
        "openvino": ("OpenVINO GenAI, dense", partial(engine, "openvino")),
        "vllm": ("vLLM for CPUs, dense", partial(engine, "vllm")),
        "ctranslate2": ("CTranslate2, dense", partial(engine, "ctranslate2")),
    }
    for name in names:
        row, make = makers[name]
        limit = TimeLimit(args.peer_seconds)
        try:
            with limit.counted():
                made[row] = replace(make(limit), limit=limit)
        except peers.Unavailable as reason:
            missing[row] = str(reason)
    return made, missing


def engine_decode(core: EngineCore, policy: RoutingPolicy, prompts: list[list[int]], tokens: int) -> Sample:
    run = serve(core, [policy], prompts, tokens)
    return Sample(run.seconds, run.step_seconds, tuple(run.distinct))


def engine_prefill(core: EngineCore, policy: RoutingPolicy, prompts: list[list[int]]) -> Sample:
    return Sample(serve(core, [policy], prompts, 2).prefill_seconds)


def peer_sample(limit: TimeLimit, measure: Callable[[], float]) -> Sample:
    """Raises Unavailable if the engine has no time left, or if its process does not answer in time."""
    if not limit.left:
        raise peers.Unavailable(str(limit))
    with limit.counted():
        return Sample(measure())


def batch_sizes(args: argparse.Namespace) -> list[int]:
    return [int(batch) for batch in args.batch.split(",")]


def make_rows(
    subjects: Subjects, others: dict[str, Rival], batches: Sequence[int], args: argparse.Namespace
) -> dict[RowKey, Callable[[], Sample]]:
    """The functions that measure each row."""
    sizes = EngineConfig(
        device=args.device,
        max_num_seqs=max(batches),
        max_step_tokens=max(512, args.prefill, max(batches) * args.prompt),
        prefix_caching=False,  # all rounds must do the same work
    )
    core, dense_core = assemble_core(subjects.moe, sizes), assemble_core(subjects.dense, sizes)
    dense_policy = RoutingPolicy("dense", "", (None,) * subjects.dense.config.num_hidden_layers)
    engines = {"dense": (dense_core, dense_policy)} | {name: (core, policy) for name, policy in subjects.policies.items()}
    if BUDGET in engines:  # in its own engine, because the option for budgets slows down every step
        engines[BUDGET] = (assemble_core(subjects.moe, replace(sizes, batch_budgets=True)), subjects.policies[BUDGET])
    vocab_size = subjects.moe.config.vocab_size

    rows: dict[RowKey, Callable[[], Sample]] = {}
    for batch in batches:
        prompts = random_prompts(batch, args.prompt, vocab_size)
        for name, peer in others.items():
            rows["decode", batch, name] = partial(peer_sample, peer.limit, partial(peer.decode, prompts, args.tokens))
        for name, (each, policy) in engines.items():
            rows["decode", batch, name] = partial(engine_decode, each, policy, prompts, args.tokens)
    prompt = random_prompts(1, args.prefill, vocab_size)
    for name, peer in others.items():
        if peer.prefill is not None:
            rows["prefill", 1, name] = partial(peer_sample, peer.limit, partial(peer.prefill, prompt))
    for name, (each, policy) in engines.items():
        rows["prefill", 1, name] = partial(engine_prefill, each, policy, prompt)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a converted checkpoint")
    parser.add_argument("--dense", type=Path, help="its dense source, for the peers")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead")
    parser.add_argument("--batch", default="1,8", help="batch sizes")
    parser.add_argument("--policies", default="full,balanced,fast")
    parser.add_argument("--peers", default=",".join(PEERS), help="other engines, of: " + ", ".join(PEERS))
    parser.add_argument(
        "--environments", type=Path, default=Path("engines"), help="directory of the other engines' environments"
    )
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens before decoding")
    parser.add_argument("--tokens", type=int, default=65, help="generated tokens")
    parser.add_argument("--prefill", type=int, default=512, help="prompt tokens of the prefill measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-seconds", type=float, default=300, help="what each other engine may take in all")
    parser.add_argument("--matrix", type=int, default=1024, help="size of the product whose rate counts as the machine's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="integer weights in our engine; CPU only")
    args = parser.parse_args(arguments)
    wanted = [name for name in args.peers.split(",") if name]
    if unknown := sorted(set(wanted) - set(PEERS)):
        parser.error(f"there is no peer {unknown[0]!r}")
    if args.shape is None and (args.model is None or args.dense is None):
        parser.error("give MODEL and --dense, or --shape")

    threads = torch.get_num_threads()
    device = choose_device(args.device)
    if args.shape is not None:
        dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
        subjects = random_subjects(args.shape, dtype, device)
    else:
        dtype = choose_backend(read_config(args.dense), stored_dtype(args.dense), args.device, args.dtype).dtype
        subjects = read_subjects(args.model, args.dense, args.policies.split(","), dtype, device)
    for model in (subjects.moe, subjects.dense):
        prepare_to_serve(model, args.quantize)
    others, missing = make_peers(wanted, subjects.dense_peer, args)
    batches = batch_sizes(args)
    bandwidth = read_bandwidth(device)
    products = max(matrix_rate(device, kind, args.matrix) for kind in {dtype, torch.float32})
    rows = make_rows(subjects, others, batches, args)

    def run_round() -> dict[RowKey, Sample]:
        taken = {}
        for key, run in list(rows.items()):
            torch.set_num_threads(threads)  # the engine changes this number
            try:
                taken[key] = run()
            except Exception as error:  # an error of another library must not lose the other rows
                if key[2] not in others:
                    raise
                reason = str(error) if isinstance(error, peers.Unavailable) else f"{type(error).__name__}: {error}"
                missing[f"{key[2]}, {key[0]} {key[1]}"] = reason
                del rows[key]
        return taken

    run_round()  # warm-up
    load, started = OtherLoad(), time.perf_counter()
    samples: dict[RowKey, list[Sample]] = {}
    for _ in range(args.rounds):
        for key, sample in run_round().items():
            samples.setdefault(key, []).append(sample)
    other = load.cores(time.perf_counter() - started)
    # Integer weights have their scales beside them.
    weight_size = None if args.quantize is None else bytes_per_weight({"int8": 8, "int4": 4}[args.quantize])
    results = []
    for key, taken in samples.items():
        measure, batch, name = key
        config = subjects.dense.config if name == "dense" or name in others else subjects.moe.config
        tokens = batch * (args.tokens - 1) if measure == "decode" else args.prefill
        speeds = sorted(tokens / sample.seconds for sample in taken)
        row: dict[str, Any] = {
            "measure": measure,
            "batch": batch,
            "policy": name,
            "tokens_per_second": statistics.median(speeds),
            "lowest": speeds[0],
            "highest": speeds[-1],
            "rounds": len(taken),
        }
        for ratio, peer in (("ratio_to_transformers", REFERENCE), ("ratio_to_llama_cpp", LLAMA_CPP)):
            if (reference := samples.get((measure, batch, peer))) is not None:
                both = zip(taken, reference, strict=False)  # an engine that was stopped has fewer rounds
                row[ratio] = statistics.median(b.seconds / a.seconds for a, b in both)
        if measure == "decode":
            distinct = taken[-1].distinct or (None,) * config.num_hidden_layers
            need = decode_bytes(config, distinct, batch, args.prompt + args.tokens / 2, dtype.itemsize, weight_size)
            step = statistics.median(sample.step_seconds or sample.seconds / (args.tokens - 1) for sample in taken)
            row |= {"fraction_of_bandwidth": need / bandwidth / step, "distinct_experts_per_step": mean(distinct)}
        if not config.moe_layer_indices:  # elsewhere the operations depend on the policy
            words = 1 if measure == "decode" else 1 / args.prefill  # a prompt needs the logits of its last token only
            operations = 2 * (config.dense_parameters + words * config.hidden_size * config.vocab_size)
            row["fraction_of_products"] = operations * row["tokens_per_second"] / products
        results.append(row)
    print_table(results)
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    limits = f"bandwidth {bandwidth / 1e9:.1f} GB/s (read), products {products / 1e9:.0f} GFLOP/s (torch)"
    print(f"{limits}; other processes kept {other:.2f} cores busy")
    record = {
        "benchmark": "engine_bench",
        "model": args.shape or str(args.model),
        "prompt_tokens": args.prompt,
        "generated_tokens": args.tokens,
        "prefill_tokens": args.prefill,
        "rounds": args.rounds,
        "quantize": args.quantize,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "read_bandwidth_bytes_per_second": bandwidth,
        "products_per_second": products,
        "other_load_cores": other,
        "left_out": missing,
        "versions": {name: rival.version for name, rival in others.items() if rival.version is not None},
        "results": results,
        **conditions(),
        "threads": threads,
    }
    print(json.dumps(record))


def print_table(results: Sequence[dict[str, Any]]) -> None:
    heads = f"{'tok/s':>9} {'spread':>19} {'x hf':>6} {'x cpp':>6} {'bandwidth':>10} {'products':>9} {'distinct':>9}"
    print(f"{'':<8}{'batch':>5}  {'policy':<40} {heads}")
    columns = (
        ("ratio_to_transformers", ">6.2f"),
        ("ratio_to_llama_cpp", ">6.2f"),
        ("fraction_of_bandwidth", ">10.1%"),
        ("fraction_of_products", ">9.1%"),
        ("distinct_experts_per_step", ">9.2f"),
    )
    for row in results:
        cells = " ".join(_cell(row.get(field), form) for field, form in columns)
        spread = f"{row['lowest']:.1f}-{row['highest']:.1f}"
        head = f"{row['measure']:<8}{row['batch']:>5}  {row['policy']:<40}"
        print(f"{head} {row['tokens_per_second']:9.1f} {spread:>19} {cells}")


def _cell(value: float | None, form: str) -> str:
    width = form[1:].partition(".")[0]
    return " " * int(width) if value is None else format(value, form)


if __name__ == "__main__":
    main()
