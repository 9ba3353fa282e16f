"""Decode speed of the engine by batch and policy, beside transformers' `generate` on the dense source, in the same run.

    python -m loadtests.engine_bench models/demo --dense ladimo/demo/model [--batch 1,8] [--policies full,fast]

Rounds are interleaved: each measures every row once, in turn. A row's figure is the median of its rounds, its ratio the
median of the per-round ratios to transformers. Decode only: the time from the first token of the last prompt on.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import choose_device, choose_dtype, read_config, read_policies
from ladimo.policy import RoutingPolicy
from loadtests.conditions import OtherLoad, conditions
from server.engine.config import EngineConfig
from server.engine.core import EngineCore, build_core
from server.engine.messages import ExpertSnapshot, ReadExperts, Submit
from server.engine.request import GenerationRequest, SamplingParams

PEER = "transformers generate, dense"


def engine_round(core: EngineCore, policy: RoutingPolicy, prompts: list[list[int]], tokens: int) -> float:
    """Seconds to decode `tokens` - 1 tokens after the first, for all prompts as one batch."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        core.handle(Submit(GenerationRequest(f"r{index}", tuple(prompt), sampling, policy)))
    begun = 0
    while begun < len(prompts):
        begun += len(core.step().stats.first_token_seconds)
    started = time.perf_counter()
    while core.has_work:
        core.step()
    return time.perf_counter() - started


@torch.inference_mode()
def transformers_round(model: Any, prompts: list[list[int]], tokens: int) -> float:
    """The same with `generate`: the time for all tokens less the time for one."""
    ids = torch.tensor(prompts, device=model.device)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return seconds(tokens) - seconds(1)


def distinct_experts(core: EngineCore, run: Callable[[], float]) -> float | None:
    """Mean different experts per expert layer and step during `run`."""

    def histogram() -> list[list[int]]:
        snapshot = core.handle(ReadExperts(0))
        assert isinstance(snapshot, ExpertSnapshot)
        return snapshot.distinct_experts

    before = histogram()
    run()
    steps = [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(before, histogram(), strict=True)]
    layers = [sum(n * count for n, count in enumerate(layer)) / sum(layer) for layer in steps if sum(layer)]
    return sum(layers) / len(layers) if layers else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a converted checkpoint")
    parser.add_argument("--dense", type=Path, required=True, help="its dense source, for the peer")
    parser.add_argument("--batch", default="1,8", help="batch sizes")
    parser.add_argument("--policies", default="full,balanced,fast")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=65, help="generated tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()

    threads = torch.get_num_threads()
    config = read_config(args.model)
    policies = read_policies(args.model, config)
    batches = [int(batch) for batch in args.batch.split(",")]
    # No prefix cache: every round is to do the same work.
    sizes = EngineConfig(device=args.device, dtype=args.dtype, max_num_seqs=max(batches), prefix_caching=False)
    core, dense_core = build_core(args.model, sizes), build_core(args.dense, sizes)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, args.dense, device)
    peer = AutoModelForCausalLM.from_pretrained(args.dense, dtype=dtype).to(device)
    dense_policy = read_policies(args.dense, read_config(args.dense))["full"]
    generator = torch.Generator().manual_seed(0)
    rows: dict[tuple[int, str], Callable[[], float]] = {}
    distinct: dict[tuple[int, str], float | None] = {}
    for batch in batches:
        prompts = torch.randint(config.vocab_size, (batch, args.prompt), generator=generator).tolist()
        rows[batch, PEER] = partial(transformers_round, peer, prompts, args.tokens)
        rows[batch, "dense"] = partial(engine_round, dense_core, dense_policy, prompts, args.tokens)
        for name in args.policies.split(","):
            rows[batch, name] = partial(engine_round, core, policies[name], prompts, args.tokens)
            distinct[batch, name] = distinct_experts(core, rows[batch, name])
    for row in rows.values():
        row()  # warm
    load, started = OtherLoad(), time.perf_counter()
    samples: dict[tuple[int, str], list[float]] = {key: [] for key in rows}
    for _ in range(args.rounds):
        for key, run in rows.items():
            torch.set_num_threads(threads)  # the engine changes it as it sees fit
            samples[key].append(run())
    other = load.cores(time.perf_counter() - started)
    results = []
    print(f"{'batch':>5}  {'policy':<30} {'tok/s':>8} {'spread':>15} {'x peer':>7} {'distinct experts':>17}")
    for (batch, name), seconds in samples.items():
        speeds = sorted(batch * (args.tokens - 1) / s for s in seconds)
        ratio = statistics.median(p / s for p, s in zip(samples[batch, PEER], seconds, strict=True))
        hit = distinct.get((batch, name))
        results.append(
            {
                "batch": batch,
                "policy": name,
                "tokens_per_second": statistics.median(speeds),
                "lowest": speeds[0],
                "highest": speeds[-1],
                "ratio_to_transformers": ratio,
                "distinct_experts_per_step": hit,
            }
        )
        print(
            f"{batch:>5}  {name:<30} {statistics.median(speeds):8.1f} {f'{speeds[0]:.1f}-{speeds[-1]:.1f}':>15} {ratio:7.2f} "
            f"{'' if hit is None else f'{hit:.2f}':>17}"
        )
    print(f"other processes kept {other:.2f} cores busy")
    record = {
        "benchmark": "engine_bench",
        "model": str(args.model),
        "prompt_tokens": args.prompt,
        "generated_tokens": args.tokens,
        "rounds": args.rounds,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "other_load_cores": other,
        "results": results,
        **conditions(),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
