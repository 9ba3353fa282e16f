"""Time of prompts per policy, beside what the server predicts from the time of a multiply-add at each number of bits.

    python -m loadtests.costs.prefill_bench MODEL [--dense DIR] [--policies full,quality,balanced,fast]

Both times are relative to the dense model with whole weights: that of --dense, or policy `full` of a checkpoint that keeps
whole weights. Rounds are interleaved, and each round measures every row once. `median`: of a row's ratios per round.
`fastest`: the ratio of the fastest rounds, which other work on the machine disturbs least. The prediction is that of
`--frontier-batch prefill`, made before the first round and after the last. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ladimo.checkpoint import load_to_serve, read_config, read_frontier, read_policies, stored_dtype
from ladimo.model.config import ModelConfig
from ladimo.policy import Frontier, RoutingPolicy
from ladimo.prefill import FormCosts, prefill_frontier
from ladimo.prefill.costs import PROMPT
from ladimo.prefill.measure import measure_form_costs
from loadtests.common.conditions import OtherLoad, conditions
from loadtests.common.runs import Run, interleaved, random_prompts, serve, spread
from server.engine.build import assemble_core
from server.engine.config import EngineConfig
from server.engine.core import EngineCore

DENSE = "the dense model"


def load_core(directory: Path, args: argparse.Namespace) -> EngineCore:
    sizes = EngineConfig(
        device=args.device,
        max_num_seqs=1,
        max_step_tokens=args.prompt,
        max_model_len=args.prompt + 8,
        prefix_caching=False,  # all rounds must do the same work
    )
    return assemble_core(load_to_serve(directory, args.device, args.dtype, context=args.prompt + 8), sizes)


def predicted(
    frontier: Frontier, policies: dict[str, RoutingPolicy], config: ModelConfig, costs: FormCosts | None
) -> dict[str, float]:
    """`prefill_time_ratio` of every measured policy."""
    found = prefill_frontier(frontier, policies, config, costs)
    return {point.policy: point.cost for point in (*found.points, *found.beaten)}


def fastest(runs: Sequence[Run]) -> float:
    return min(run.prefill_seconds for run in runs)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a converted checkpoint")
    parser.add_argument("--dense", type=Path, help="its dense source; needed where the checkpoint has no whole weights")
    parser.add_argument("--policies", help="names, separated by commas; all that are on its frontier if not given")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(arguments)
    config, frontier = read_config(args.model), read_frontier(args.model)
    if frontier is None:
        parser.error(f"{args.model} has no measured frontier")
    if args.dense is None and config.nested_top_bits is not None:
        parser.error("the checkpoint has no whole weights to compare with; give --dense")
    known = read_policies(args.model, config)
    on_it = [name for name in known if any(point.policy == name for point in frontier.points)]
    names = on_it if args.policies is None else args.policies.split(",")
    if missing := [name for name in names if name not in on_it]:
        parser.error(f"there is no measured policy {missing[0]!r}; there are {', '.join(on_it)}")

    def costs() -> FormCosts | None:
        if not config.nested_bits:
            return None
        return measure_form_costs(config, stored_dtype(args.model), args.device, args.dtype, args.prompt)

    before = costs()
    prompt = random_prompts(1, args.prompt, config.vocab_size)
    reference, rows = "full", dict[str, Callable[[], Run]]()
    if args.dense is not None:
        reference, depth = DENSE, config.num_hidden_layers
        rows[DENSE] = partial(serve, load_core(args.dense, args), [RoutingPolicy(DENSE, "", (None,) * depth)], prompt, 2)
    core = load_core(args.model, args)
    for name in dict.fromkeys(names if args.dense is not None else ["full", *names]):
        rows[name] = partial(serve, core, [known[name]], prompt, 2)
    other, started = OtherLoad(), time.perf_counter()
    runs = interleaved(rows, args.rounds)
    busy = other.cores(time.perf_counter() - started)
    after = costs()
    first, last = (predicted(frontier, known, config, one) for one in (before, after))
    perplexity = {point.policy: point.perplexity_ratio for point in frontier.points}
    results = []
    print(f"{'policy':<16} {'perplexity':>10} {'predicted':>15} {'median':>7} {'fastest':>7} {'tokens/s':>9}  spread of ratios")
    for name, taken in runs.items():
        ratios = [run.prefill_seconds / whole.prefill_seconds for run, whole in zip(taken, runs[reference], strict=True)]
        row: dict[str, Any] = {
            "policy": name,
            "perplexity_ratio": 1.0 if name == DENSE else perplexity[name],
            "predicted_time_ratio": [1.0, 1.0] if name == DENSE else [first[name], last[name]],
            "time_ratio": statistics.median(ratios),
            "fastest_time_ratio": fastest(taken) / fastest(runs[reference]),
            "time_ratio_spread": [min(ratios), max(ratios)],
            "tokens_per_second": args.prompt / statistics.median(run.prefill_seconds for run in taken),
        }
        results.append(row)
        guesses = " ".join(f"{ratio:7.3f}" for ratio in row["predicted_time_ratio"])
        print(
            f"{name:<16} {row['perplexity_ratio']:10.4f} {guesses} {row['time_ratio']:7.3f} {row['fastest_time_ratio']:7.3f} "
            f"{row['tokens_per_second']:9.1f}  "
            f"{spread(ratios)}"
        )
    record = {"benchmark": "prefill_bench", "model": str(args.model), "prompt_tokens": args.prompt, "rounds": args.rounds}
    record |= {"form_costs": [None if one is None else one.to_dict() for one in (before, after)]}
    print(json.dumps(record | {"other_load_cores": busy, "results": results} | conditions()))


if __name__ == "__main__":
    main()
