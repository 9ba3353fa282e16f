"""Compares estimated and measured damage per layer: how well they agree, how long they take, and how good the plans are.

    python -m loadtests.accuracy.damage_bench ladimo/demo/model --out damage.json [--text FILE] [--tokens 100000]
        [--budgets 0.9,0.8]

Every layer is solved as method elastic does it. Then the damage of every width of every layer is found in three ways: measured;
estimated to second order; and, as the method does it, estimated and then corrected. A layer with large damage is corrected by
one measurement. Each way gives a plan for each budget. The plans are evaluated without training, on text that was not used
before.
"""

import argparse
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ladimo.checkpoint import choose_device, write_json
from ladimo.convert.data.calibration import Encoder, calibrate
from ladimo.convert.evaluation.measure import measure
from ladimo.convert.evaluation.variants import Rules
from ladimo.convert.jobs.layer_jobs import work_on_layers
from ladimo.convert.methods.elastic.layers import SolvedLayers, solve_layer
from ladimo.convert.methods.elastic.method import Probe
from ladimo.convert.methods.elastic.plans import Plan, Planner
from ladimo.convert.methods.elastic.recipe import ElasticRecipe
from ladimo.convert.methods.elastic.training import scanned
from ladimo.convert.methods.registry import get_method
from ladimo.convert.policies.sensitivity import LARGE, rule_damages
from ladimo.convert.recipe import Recipe
from ladimo.convert.run import Run
from ladimo.convert.streamed_model import StreamedModel
from ladimo.convert.workspace import Workspace
from loadtests.common.conditions import conditions

Table = dict[int, dict[int, float]]  # KL by layer and width
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)


def bench(model: Path, text: Path | None, tokens: int, budgets: tuple[float, ...], directory: Path) -> dict[str, Any]:
    dense = StreamedModel(model, choose_device("auto"))
    recipe = Recipe().override({"tokens": tokens, "elastic.budgets": list(budgets), "elastic.steps": 0})
    recipe = get_method("elastic").resolve(recipe, dense.config, dense.device)
    run = Run(Workspace(directory / "moe", {}), recipe, dense, tuple(range(dense.config.num_hidden_layers)))
    calibration = calibrate(Encoder(model, dense.config), tokens, 0, None if text is None else [text])
    work_on_layers(run, calibration, solve_layer)
    probe = Probe(run, SolvedLayers(run))
    blocks = scanned(calibration.holdout, recipe.section(ElasticRecipe))
    rules = dict.fromkeys(run.candidates, probe.rules)
    tables: dict[str, Table] = {}
    seconds: dict[str, float] = {}
    reference: Rules = (None,) * dense.config.num_hidden_layers

    started = time.monotonic()
    alone = {
        (index, count): tuple(rule if layer == index else None for layer in range(len(reference)))
        for index in run.candidates
        for count, rule in probe.fixed.items()
    }
    measured = measure(dense, probe, blocks, [reference, *alone.values()], reference)
    seconds["measured"] = time.monotonic() - started
    tables["measured"] = {
        index: {count: measured[alone[index, count]].kl or 0.0 for count in probe.fixed} for index in run.candidates
    }
    checked = 0
    for name, large in (("estimated", math.inf), ("corrected", LARGE)):
        started = time.monotonic()
        found = rule_damages(dense, probe, rules, blocks, large=large)
        seconds[name] = time.monotonic() - started
        tables[name] = {index: {count: found[index][rule].kl for count, rule in probe.fixed.items()} for index in found}
        checked = sum(one.measured for own in found.values() for one in own.values())
    planner = Planner(dense.config, run.candidates, recipe.split.experts, budgets)
    plans = {name: planner.plans(table, {}) for name, table in tables.items()}
    rows = evaluate(run, probe, plans, calibration.evaluation)
    return {
        "model": model.name,
        "text": "Python's standard library" if text is None else text.name,
        "tokens": {"scanned": blocks.numel(), "evaluated": calibration.evaluation.numel()},
        "layers": len(reference),
        "widths": len(probe.fixed),
        "measured_to_correct": checked,
        "seconds": seconds,
        "agreement": {name: agreement(tables["measured"], tables[name]) for name in ("estimated", "corrected")},
        "plans": rows,
        "damage": {name: {str(i): {str(n): kl for n, kl in own.items()} for i, own in t.items()} for name, t in tables.items()},
    }


def evaluate(run: Run, probe: Probe, plans: Mapping[str, list[Plan]], blocks: Any) -> list[dict[str, Any]]:
    """One row per budget and way: the plan, its active parameters, its perplexity ratio and its divergence, without
    training."""
    experts, config = run.recipe.split.experts, run.dense.config
    reference: Rules = (None,) * config.num_hidden_layers

    def rules(plan: Plan) -> Rules:
        return tuple(None if width == experts else probe.fixed[width] for width in plan.widths)

    wanted = {rules(plan): plan for own in plans.values() for plan in own}
    measured = measure(run.dense, probe, blocks, [reference, *wanted], reference)
    dense = measured[reference].perplexity
    whole = Planner(config, run.candidates, experts, ()).partitioned(dict.fromkeys(run.candidates, 0))
    return [
        {
            "budget": run.recipe.section(ElasticRecipe).budgets[plan.budget],
            "damage": name,
            "widths": list(plan.widths),
            "active_parameters_ratio": whole.active_parameters_ratio(tuple(map(float, plan.widths))),
            "perplexity_ratio": measured[rules(plan)].perplexity / dense,
            "kl": measured[rules(plan)].kl,
        }
        for number in range(len(next(iter(plans.values()))))
        for name, own in plans.items()
        for plan in [own[number]]
    ]


def agreement(measured: Table, found: Table) -> dict[str, float]:
    """Compare logarithms of damage: the correlation, and the mean and standard deviation of `found` minus `measured`."""
    pairs = [(math.log(kl), math.log(found[index][n])) for index, own in measured.items() for n, kl in own.items() if kl > 1e-9]
    theirs, ours = zip(*pairs, strict=True)
    apart = [our - their for their, our in pairs]
    return {
        "log_correlation": statistics.correlation(theirs, ours),
        "mean_log_ratio": statistics.mean(apart),
        "sd_log_ratio": statistics.stdev(apart),
    }


def table(result: dict[str, Any]) -> str:
    lines = ["| budget | measured | estimated | corrected |", "| --- | --- | --- | --- |"]
    for budget in dict.fromkeys(row["budget"] for row in result["plans"]):
        own = [row for row in result["plans"] if row["budget"] == budget]
        cells = [f"{row['perplexity_ratio']:.4f}, KL {row['kl']:.4f} at {row['active_parameters_ratio']:.1%}" for row in own]
        lines.append(f"| {budget:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    args = parser.parse_args()
    budgets = tuple(float(budget) for budget in args.budgets.split(","))
    with TemporaryDirectory() as directory:
        result = bench(args.model, args.text, args.tokens, budgets, Path(directory))
    write_json(args.out, {"benchmark": "damage", **conditions(), **result})
    print(table(result))
    print({name: round(value, 1) for name, value in result["seconds"].items()}, result["agreement"])


if __name__ == "__main__":
    main()
