"""The time to draw the next tokens on a CPU, by batch size and kind of request.

    python -m loadtests.costs.sampling_bench [MODEL] [--rows 1,8,32] [--vocab 49152]

Logits are normally distributed numbers times a factor. With factor 6 a few tokens have nearly all of the probability, as when a
model is sure. With factor 2 hundreds of tokens share it. The compiled draw is compared with torch's operations and with a
stable sort of each row's vocabulary. With MODEL, the size of the vocabulary is the model's. Each figure is then also given as a
share of the model's median greedy decode step at the same batch size. `adjusted`: greedy rows with penalties, including the
copy of their logits.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ladimo.checkpoint import read_config, read_policies
from ladimo.model.backends.choose import NUM_THREADS
from ladimo.model.cpu.build import library
from ladimo.model.cpu.native_draw import NativeDraw
from ladimo.model.cpu.pool import Pool
from ladimo.policy import RoutingPolicy
from loadtests.common.conditions import OtherLoad, conditions
from loadtests.common.runs import random_prompts, serve
from server.engine.build import build_core
from server.engine.config import EngineConfig
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.request import Sequence as EngineSequence
from server.engine.sampling.logit_adjuster import LogitAdjuster
from server.engine.sampling.sampler import SamplingInputs, cuts, make_sampling_inputs, sample

Draw = Callable[[Tensor, SamplingInputs | None], Tensor]

KINDS = {
    "greedy": SamplingParams(1, temperature=0.0),
    "random": SamplingParams(1),
    "top_p 0.9": SamplingParams(1, top_p=0.9),
    "top_k 40": SamplingParams(1, top_k=40),
    "min_p 0.05": SamplingParams(1, min_p=0.05),
    "adjusted": SamplingParams(1, temperature=0.0, repetition_penalty=1.1, presence_penalty=0.5),
}
LOGITS = {"sure": 6.0, "unsure": 2.0}


def by_sorting(logits: Tensor, inputs: SamplingInputs | None) -> Tensor:
    """A draw that always sorts the whole vocabulary of every row."""
    if inputs is None:
        return logits.argmax(dim=-1)
    (logits.float() / inputs.temperature.float().unsqueeze(-1)).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    return sample(logits, replace(inputs, cuts=False))


def compiled() -> Draw | None:
    code = library()
    if code is None:
        return None
    native = NativeDraw(Pool(code, NUM_THREADS))

    def draw(logits: Tensor, inputs: SamplingInputs | None) -> Tensor:
        if inputs is None:
            return native.likeliest(logits)
        return native.draw(logits, inputs.temperature, inputs.top_p, inputs.min_p, inputs.uniform, inputs.top_k)

    return draw


def sequences(params: SamplingParams, rows: int, vocab: int) -> list[EngineSequence]:
    policy = RoutingPolicy("none", "", ())
    prompts = random_prompts(rows, 500, vocab)
    asked = [GenerationRequest(f"r{row}", tuple(prompt), params, policy) for row, prompt in enumerate(prompts)]
    return [EngineSequence(request, (1,), row, 0.0, []) for row, request in enumerate(asked)]


def step(draw: Draw, logits: Tensor, rows: Sequence[EngineSequence], adjuster: LogitAdjuster | None) -> None:
    """The work of the model runner between logits and tokens."""
    inputs = make_sampling_inputs(rows, logits.device)
    if adjuster is not None:
        draw(logits, inputs)
        logits = logits[list(range(len(rows)))]
        adjuster.adjust(logits, rows)
    draw(logits, inputs)


def seconds(run: Callable[[], None], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - started) / repeats


def step_seconds(model: Path, rows: int) -> float:
    config = read_config(model)
    policy = next(iter(read_policies(model, config).values()), RoutingPolicy("dense", "", (None,) * config.num_hidden_layers))
    core = build_core(model, EngineConfig(device="cpu", max_num_seqs=rows, prefix_caching=False))
    prompts = random_prompts(rows, 64, config.vocab_size)
    serve(core, [policy], prompts, 9)  # warm-up
    return serve(core, [policy], prompts, 33).step_seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a checkpoint; figures are also given as shares of its decode step")
    parser.add_argument("--rows", default="1,8,32", help="batch sizes")
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=3, help="draws per round")
    args = parser.parse_args(argv)
    vocab = args.vocab if args.model is None else read_config(args.model).vocab_size
    sizes = [int(rows) for rows in args.rows.split(",")]
    load, begun = OtherLoad(), time.perf_counter()
    steps = {rows: None if args.model is None else step_seconds(args.model, rows) for rows in sizes}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the engine with the compiled step
    draws: dict[str, Draw | None] = {"compiled": compiled(), "torch": sample, "sorting": by_sorting}
    adjuster = LogitAdjuster(frozenset(), torch.device("cpu"))
    runs: dict[tuple[int, str, str, str], Callable[[], None]] = {}
    for rows in sizes:
        for logits_name, factor in LOGITS.items():
            logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * factor
            for kind, params in KINDS.items():
                if logits_name == "sure" and not cuts(params):
                    continue  # it would take the same time
                asked = sequences(params, rows, vocab)
                own = adjuster if kind == "adjusted" else None
                for name, draw in draws.items():
                    if draw is not None:
                        runs[rows, kind, logits_name, name] = partial(step, draw, logits, asked, own)
    samples: dict[tuple[int, str, str, str], list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    for _ in range(args.rounds):
        for key, run in runs.items():
            samples[key].append(seconds(run, args.repeats))
    results: list[dict[str, Any]] = []
    for (rows, kind, logits_name, name), taken in samples.items():
        middle, whole = statistics.median(taken), steps[rows]
        results.append(
            {
                "rows": rows,
                "kind": kind,
                "logits": logits_name,
                "draw": name,
                "milliseconds": 1000 * middle,
                "lowest": 1000 * min(taken),
                "share_of_step": None if whole is None else middle / whole,
            }
        )
    print(f"{'rows':>4}  {'kind':<11} {'logits':<7} {'draw':<9} {'ms':>9} {'lowest':>9} {'of a step':>10}")
    for row in results:
        share = "" if row["share_of_step"] is None else f"{row['share_of_step']:.1%}"
        head = f"{row['rows']:>4}  {row['kind']:<11} {row['logits']:<7} {row['draw']:<9}"
        print(f"{head} {row['milliseconds']:9.2f} {row['lowest']:9.2f} {share:>10}")
    other = load.cores(time.perf_counter() - begun)
    print(f"other processes kept {other:.2f} cores busy")
    record = {
        "benchmark": "sampling_bench",
        "model": None if args.model is None else str(args.model),
        "vocab": vocab,
        "rounds": args.rounds,
        "step_seconds": steps,
        "other_load_cores": other,
        "results": results,
        **conditions(),
        "threads": threads,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
