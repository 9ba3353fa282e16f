"""Decode speed of batches whose requests run under different policies.

    python -m loadtests.costs.mixed_bench MODEL [--batch 1,8,32] [--policies full,quality,balanced,fast]

The rows are batches that run under one policy alone, batches of the first and the last policy in equal parts, and batches of
all policies in equal parts. Rounds are interleaved. A row's speed is the median of its rounds, in tokens per second. Its ratio
is the median of its ratios per round to the first policy alone. Each row also says what its policies cost: the mean of their
weight bytes (or active parameters) relative to the dense model. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ladimo.checkpoint import load_to_serve, read_config, read_frontier, read_policies
from ladimo.model.config import ModelConfig
from ladimo.policy import RoutingPolicy
from loadtests.common.conditions import OtherLoad, conditions
from loadtests.common.runs import interleaved, random_prompts, serve, spread
from server.engine.build import assemble_core
from server.engine.config import EngineConfig


def mixtures(policies: Sequence[RoutingPolicy], batch: int) -> dict[str, list[RoutingPolicy]]:
    """The policies that a batch's requests take in turn, by the name of the row."""
    rows = {f"all {policy.name}": [policy] for policy in policies}
    if batch >= 2:
        rows[f"half {policies[0].name}, half {policies[-1].name}"] = [policies[0], policies[-1]]
    if batch >= len(policies) > 2:
        rows["equal parts of all"] = list(policies)
    return rows


def cost(policy: RoutingPolicy, config: ModelConfig, measured: Mapping[str, float]) -> float:
    """The measured cost on the frontier. Of a policy that is not there, weight bytes of a nested model without what it refines,
    else active parameters at its most experts. All relative to the dense model."""
    experts = tuple(None if rule is None else float(rule.top_k) for rule in policy.layers)
    known = measured.get(policy.name)
    return known or policy.bytes_ratio(config, experts, 0.0) or config.active_parameters_ratio(experts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a converted checkpoint")
    parser.add_argument("--batch", default="1,8,32", help="batch sizes")
    parser.add_argument("--policies", default="full,quality,balanced,fast", help="most accurate first")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens before decoding")
    parser.add_argument("--tokens", type=int, default=65, help="generated tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(arguments)
    config = read_config(args.model)
    known, batches = read_policies(args.model, config), [int(batch) for batch in args.batch.split(",")]
    if missing := [name for name in args.policies.split(",") if name not in known]:
        parser.error(f"there is no policy {missing[0]!r}; there are {', '.join(known)}")
    policies = [known[name] for name in args.policies.split(",")]
    frontier = read_frontier(args.model)
    measured = {point.policy: point.cost for point in frontier.points if point.batch == 1} if frontier else {}
    sizes = EngineConfig(
        device="cpu",
        max_num_seqs=max(batches),
        max_step_tokens=max(512, max(batches) * args.prompt),
        prefix_caching=False,  # all rounds must do the same work
    )
    core = assemble_core(load_to_serve(args.model, "cpu", args.dtype), sizes)
    other, started, results = OtherLoad(), time.perf_counter(), []
    print(f"{'batch':>5} {'policies':<28} {'cost':>6} {'tokens/s':>9} {'ratio':>6}  spread")
    for batch in batches:
        prompts = random_prompts(batch, args.prompt, config.vocab_size)
        mixed = mixtures(policies, batch)
        runs = interleaved(
            {name: partial(serve, core, some, prompts, args.tokens) for name, some in mixed.items()}, args.rounds
        )
        first = next(iter(runs.values()))
        for name, samples in runs.items():
            ratios = [base.step_seconds / run.step_seconds for base, run in zip(first, samples, strict=True)]
            row: dict[str, Any] = {
                "batch": batch,
                "policies": name,
                "cost": statistics.mean(cost(policy, config, measured) for policy in mixed[name]),
                "tokens_per_second": batch / statistics.median(run.step_seconds for run in samples),
                "ratio": statistics.median(ratios),
                "ratio_spread": [min(ratios), max(ratios)],
            }
            results.append(row)
            print(
                f"{batch:>5} {name:<28} {100 * row['cost']:5.1f}% {row['tokens_per_second']:9.1f} {row['ratio']:6.2f}  "
                f"{spread(ratios)}"
            )
    record = {"benchmark": "mixed_bench", "model": str(args.model), "dtype": args.dtype, "rounds": args.rounds}
    record |= {"prompt_tokens": args.prompt, "generated_tokens": args.tokens}
    busy = other.cores(time.perf_counter() - started)
    print(json.dumps(record | {"other_load_cores": busy, "results": results} | conditions()))


if __name__ == "__main__":
    main()
