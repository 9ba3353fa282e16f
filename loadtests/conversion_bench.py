"""Compares the conversion methods at equal budgets of active parameters, on the same model, tokens and evaluation.

    python -m loadtests.conversion_bench ladimo/demo/model --out bench.json [--text FILE --evaluate FILE] [--tokens 100000]
        [--seeds 0,1,2] [--methods "ladimo;cmoe"] [--budgets 0.7,0.5] [--window 512] [--keep DIR] [--plot bench.svg]

Method nested is not compared, because its cost is weight bytes. Results are added to --out after each conversion. Results that
are there already are not computed again, so a stopped run resumes. With --keep it also resumes within a conversion; the seconds
are then those of its last run. Without --text the text is Python's standard library, and the evaluation uses its held-out
modules. Some methods have the same number of experts in all layers. For these, the last layers get one more expert as far as
the budget allows. So all methods come close to the budget. The table shows the share of parameters that is really active.
"""

import argparse
import dataclasses
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ladimo.checkpoint import choose_device, read_config, read_json, read_policies, write_json, write_text
from ladimo.convert.data.calibration import Encoder, calibrate, evaluation_blocks
from ladimo.convert.evaluation.variants import Rules
from ladimo.convert.methods.elastic.recipe import MAX_STEPS
from ladimo.convert.pipeline import convert
from ladimo.convert.policies.candidates import ConvertedModel
from ladimo.convert.recipe import Recipe
from ladimo.convert.report.outside import comparison_chart
from ladimo.convert.report_files import REPORT
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.policy import LayerRule
from loadtests.common.conditions import conditions

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
WHOLE = {"layers": "all", "policies.points": 0}
MASK_STEPS = 300  # of methods tomoe and disp, which train on the whole model
TUNED = {"train.steps": 400, "train.expert_lr": 5e-4}

Points = dict[float, Rules]  # the rules to measure for each budget


@dataclass(frozen=True)
class Variant:
    """A method with its settings. recipe: recipe values by dotted key for falling budgets. points: the rules to measure on the
    finished checkpoint for them. each_budget: a conversion has a single budget."""

    recipe: Callable[[Sequence[float], ModelConfig], dict[str, Any]]
    points: Callable[[Path, ModelConfig, Sequence[float]], Points]
    each_budget: bool = False


def variants(elastic_steps: int, mask_steps: int = MASK_STEPS, layer_steps: int | None = None) -> dict[str, Variant]:
    """layer_steps: the steps per layer of methods that train layer by layer; None: each variant's own number."""
    some_steps = {} if layer_steps is None else {"train.steps": layer_steps}

    def same(values: dict[str, Any]) -> Callable[[Sequence[float], ModelConfig], dict[str, Any]]:
        return lambda budgets, config: {**WHOLE, **some_steps, **values}

    def static(budgets: Sequence[float], config: ModelConfig) -> dict[str, Any]:
        (budget,) = budgets
        return {**WHOLE, **TUNED, **some_steps, "method": "static", "target_active": budget}

    def cmoe(budgets: Sequence[float], config: ModelConfig) -> dict[str, Any]:
        (budget,) = budgets
        count = max(1, min(8, int(uniform_experts(config, 8, 2 * config.hidden_size, budget))))
        return {**WHOLE, **TUNED, **some_steps, "method": "cmoe", "split.top_k": count}

    def elastic(**values: Any) -> Callable[[Sequence[float], ModelConfig], dict[str, Any]]:
        return lambda budgets, config: {
            "method": "elastic",
            "elastic.budgets": list(budgets),
            "elastic.steps": elastic_steps,
            "policies.points": 0,
            **values,
        }

    def masks(method: str, **values: Any) -> Callable[[Sequence[float], ModelConfig], dict[str, Any]]:
        def recipe(budgets: Sequence[float], config: ModelConfig) -> dict[str, Any]:
            options = {"budgets": list(budgets), "steps": mask_steps, **values}
            return {**WHOLE, "method": method, **{f"{method}.{name}": value for name, value in options.items()}}

        return recipe

    return {
        "ladimo": Variant(same({"method": "ladimo"}), by_depth),
        "moefication": Variant(same({"method": "moefication", "train.steps": 400, **some_steps}), by_top_k),
        "cmoe": Variant(same({"method": "cmoe", "split.top_k": 6, "train.steps": 0}), by_top_k),
        "cmoe, tuned": Variant(cmoe, by_top_k, each_budget=True),
        "static": Variant(static, by_full, each_budget=True),
        "disp": Variant(masks("disp"), by_policy),
        "disp, each budget": Variant(masks("disp"), by_policy, each_budget=True),
        "tomoe": Variant(masks("tomoe"), by_policy),
        "tomoe, each budget": Variant(masks("tomoe"), by_policy, each_budget=True),
        "tomoe, 75% of queries and keys": Variant(masks("tomoe", qk=0.75, qk_train=True), by_policy),
        "tomoe, 75% of queries and keys, untrained gates": Variant(masks("tomoe", qk=0.75), by_policy),
        "tomoe, literal": Variant(masks("tomoe", mask_once=False, token_noise=True), by_policy),
        "static, end to end": Variant(elastic(**{"elastic.uniform": True, "split.experts": 32}), by_policy),
        "elastic, untrained": Variant(elastic(**{"elastic.steps": 0}), by_policy),
        "elastic, layer by layer": Variant(elastic(**{"elastic.max_parameters": 1}), by_policy),  # as for larger models
        "elastic, fixed": Variant(elastic(**{"elastic.routed": 0.0}), by_policy),
        "elastic": Variant(elastic(), by_policy),
    }


def uniform_experts(config: ModelConfig, num_experts: int, router_per_expert: int, budget: float) -> float:
    """The share of `num_experts` experts that every layer can run within the budget."""
    router = config.num_hidden_layers * num_experts * router_per_expert / config.dense_parameters
    ffn = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers / config.dense_parameters
    return num_experts * (budget - router - (1 - ffn)) / ffn


def by_depth(directory: Path, config: ModelConfig, budgets: Sequence[float]) -> Points:
    """Convert the least damaging layers first, as many as the budget needs, as method ladimo does. The others stay dense."""
    report = read_json(directory / REPORT)
    order = sorted(report["layers"], key=lambda layer: float(layer["converted_alone_perplexity"]))
    points: Points = {}
    for target in budgets:
        chosen: set[int] = set()
        for layer in order:
            if cost(config, _full(config, chosen)) <= target:
                break
            chosen.add(int(layer["layer"]))
        if cost(config, _full(config, chosen)) <= target:  # otherwise even all layers together do not save enough
            points[target] = _full(config, chosen)
    return points


def by_top_k(directory: Path, config: ModelConfig, budgets: Sequence[float]) -> Points:
    """The same number of experts in every layer, and one more in the last layers, as far as the budget allows."""
    points: Points = {}
    for target in budgets:
        best: Rules | None = None
        for steps in range(config.num_hidden_layers * max(layer.num_experts for layer in config.layers if layer)):
            rules = _spread_top_k(config, steps)
            if rules is None or cost(config, rules) > target:
                break
            best = rules
        if best is not None:
            points[target] = best
    return points


def by_full(directory: Path, config: ModelConfig, budgets: Sequence[float]) -> Points:
    (budget,) = budgets
    return {budget: _full(config, set(range(config.num_hidden_layers)))}


def by_policy(directory: Path, config: ModelConfig, budgets: Sequence[float]) -> Points:
    """The policy of each budget. If a budget has a fixed and a routed policy, the routed one, which comes last in the
    report."""
    policies = read_policies(directory, config)
    report = read_json(directory / REPORT)
    part = "elastic" if "elastic" in report else "masks"
    return {entry["target"]: policies[entry["policy"]].layers for entry in report[part]["budgets"]}


def cost(config: ModelConfig, rules: Rules) -> float:
    """Active parameters divided by dense ones. A layer without a rule runs its dense FFN."""
    layers = tuple(layer if rule is not None else None for layer, rule in zip(config.layers, rules, strict=True))
    experts = tuple(None if rule is None else float(rule.top_k) for rule in rules)
    return dataclasses.replace(config, layers=layers).active_parameters_ratio(experts)


def _full(config: ModelConfig, chosen: set[int]) -> Rules:
    return tuple(
        LayerRule.full(layer) if layer is not None and index in chosen else None for index, layer in enumerate(config.layers)
    )


def _spread_top_k(config: ModelConfig, steps: int) -> Rules | None:
    """1 + steps // L experts in every layer, and one more in the last steps % L layers. None if a layer has too few experts."""
    depth = config.num_hidden_layers

    def rule(index: int, layer: MoeLayerConfig | None) -> LayerRule:
        assert layer is not None
        count = 1 + steps // depth + (index >= depth - steps % depth)
        return dataclasses.replace(LayerRule.full(layer), top_k=count)

    rules = tuple(rule(index, layer) for index, layer in enumerate(config.layers))
    fits = all(rule.top_k <= layer.num_experts for rule, layer in zip(rules, config.layers, strict=True) if layer)
    return rules if fits else None


def run_variant(
    variant: Variant,
    source: Path,
    text: Sequence[Path] | None,
    tokens: int,
    seed: int,
    blocks: Tensor,
    device: str,
    budgets: Sequence[float] = BUDGETS,
    keep: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Convert and measure. Yields one result for each budget that the method can reach. keep: the directory for the converted
    checkpoints; None: they are deleted."""
    dense = StreamedModel(source, choose_device(device))
    for wanted in [(budget,) for budget in budgets] if variant.each_budget else [tuple(budgets)]:
        recipe = Recipe().override({"tokens": tokens, "seed": seed, **variant.recipe(wanted, dense.config)})
        with TemporaryDirectory() if keep is None else nullcontext(keep) as directory:
            out = Path(directory) / "-".join(map(str, wanted))
            started, cpu_started = time.monotonic(), time.process_time()
            try:
                convert(str(source), out, recipe, text, device)
            except ValueError as error:
                yield {"budget": wanted[0] if variant.each_budget else None, "error": str(error)}
                continue
            seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
            own = StreamedModel(out, dense.device)
            points = variant.points(out, own.config, wanted)
            model = ConvertedModel.of(own, dense)
            measured = model.measure(blocks, points.values())
            stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            for target, rules in points.items():
                found = measured[rules]
                yield {
                    "budget": target,
                    "active_parameters_ratio": cost(own.config, rules),
                    "perplexity_ratio": found.perplexity / measured[model.reference].perplexity,
                    "kl": found.kl,
                    "next_token_agreement": found.next_token_agreement,
                    "conversion_seconds": seconds,
                    "cpu_seconds": cpu_seconds,
                    "stored_bytes": stored,
                }


def with_window(source: Path, window: int, directory: Path) -> Path:
    """The model in `directory`, with `window` positions, so that texts are cut into blocks of so many tokens. Its other files
    are links."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        link = directory / file.name
        if file.name != "config.json" and not link.exists():
            link.symlink_to(file.resolve())
    write_json(directory / "config.json", {**read_json(source / "config.json"), "max_position_embeddings": window})
    return directory


def table(results: Iterable[dict[str, Any]]) -> str:
    """A Markdown table with a row per method and tokens, and a column per budget. Cells have the median perplexity ratio, its
    spread over seeds, and the active share."""
    rows: dict[tuple[int, str], dict[float, list[dict[str, Any]]]] = {}
    for result in results:
        if "error" not in result:
            rows.setdefault((result["tokens"], result["method"]), {}).setdefault(result["budget"], []).append(result)
    lines = ["| method | tokens | seeds | " + " | ".join(f"{100 * budget:.0f}%" for budget in BUDGETS) + " | seconds |"]
    lines.append("| --- | ---: | ---: |" + " --- |" * len(BUDGETS) + " ---: |")
    order = list(variants(0))
    for (tokens, method), budgets in sorted(rows.items(), key=lambda row: (row[0][0], -order.index(row[0][1]))):
        every = [result for found in budgets.values() for result in found]
        seeds = len({result["seed"] for result in every})
        seconds = statistics.median(result["conversion_seconds"] for result in every)
        cells = " | ".join(_cell(budgets.get(budget, [])) for budget in BUDGETS)
        lines.append(f"| {method} | {tokens:,} | {seeds} | {cells} | {seconds:.0f} |")
    return "\n".join(lines)


def _cell(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return "-"
    ratios = sorted(result["perplexity_ratio"] for result in found)
    low, median, high = (f"{x:.3f}" if x < 10 else f"{x:.0f}" for x in (ratios[0], statistics.median(ratios), ratios[-1]))
    spread = f" ({low}-{high})" if low != high else ""
    return f"{median}{spread} at {100 * statistics.mean(result['active_parameters_ratio'] for result in found):.1f}%"


def comparison(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries for `ladimo report --comparison`: the median, and half of the range over the seeds."""
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for result in results:
        if "error" not in result:
            groups.setdefault((result["method"], result["tokens"], result["budget"]), []).append(result)
    entries = []
    for (method, tokens, budget), found in groups.items():
        ratios = [result["perplexity_ratio"] for result in found]
        entries.append(
            {
                "method": method,
                "tokens": tokens,
                "target": budget,
                "active_parameters_ratio": statistics.median(result["active_parameters_ratio"] for result in found),
                "perplexity_ratio": statistics.median(ratios),
                "spread": (max(ratios) - min(ratios)) / 2,
                "seeds": len(found),
            }
        )
    return entries


def main(arguments: Sequence[str] | None = None) -> None:
    names = list(variants(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="dense checkpoint directory")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to which results are added")
    parser.add_argument("--text", type=Path, nargs="+", help="calibration text; needs --evaluate")
    parser.add_argument("--evaluate", type=Path, help="text to evaluate on; needs --text")
    parser.add_argument("--evaluate-tokens", type=int, default=20_000)
    parser.add_argument("--tokens", default="100000", help="numbers of calibration tokens, separated by ','")
    parser.add_argument("--seeds", default="0,1,2")
    every = "; ".join(names).replace("%", "%%")  # argparse formats the text
    parser.add_argument("--methods", default=";".join(names), help=f"separated by ';': {every}")
    parser.add_argument(
        "--budgets", default=",".join(map(str, BUDGETS)), help="falling, separated by ',' (default: %(default)s)"
    )
    parser.add_argument("--elastic-steps", type=int, default=MAX_STEPS, help="end-to-end steps (default: %(default)s)")
    parser.add_argument("--mask-steps", type=int, default=MASK_STEPS, help="steps of tomoe and disp (default: %(default)s)")
    parser.add_argument("--layer-steps", type=int, help="steps per layer of methods that train layer by layer")
    parser.add_argument("--window", type=int, help="tokens per block of text, BOS included (default: the model's)")
    parser.add_argument("--keep", type=Path, help="directory for the converted checkpoints, which are deleted otherwise")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plot", type=Path, help="SVG of perplexity ratio against active parameters")
    args = parser.parse_args(arguments)
    if (args.text is None) != (args.evaluate is None):
        parser.error("--text and --evaluate go together")
    chosen = [name.strip() for name in args.methods.split(";") if name.strip()]
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"unknown method {unknown[0]!r}; known: {'; '.join(names)}")
    budgets = [float(share) for share in args.budgets.split(",")]
    if unknown_budgets := [share for share in budgets if share not in BUDGETS]:
        parser.error(f"--budgets: {unknown_budgets[0]} is none of {', '.join(map(str, BUDGETS))}")
    with TemporaryDirectory() if args.keep is None else nullcontext(args.keep) as directory:
        compare(args, chosen, budgets, Path(directory))


def compare(args: argparse.Namespace, chosen: Sequence[str], budgets: Sequence[float], directory: Path) -> None:
    """Convert by the chosen methods and print the table. directory: for the model with another window, and with --keep for
    checkpoints."""
    known = variants(args.elastic_steps, args.mask_steps, args.layer_steps)
    source = args.model if args.window is None else with_window(args.model, args.window, directory / args.model.name)
    encoder = Encoder(source, read_config(source))
    if args.evaluate is None:
        blocks = calibrate(encoder, 5 * args.evaluate_tokens, 0, None).evaluation
    else:
        blocks = evaluation_blocks(encoder, args.evaluate, args.evaluate_tokens)
    record: dict[str, Any] = read_json(args.out) if args.out.exists() else {"benchmark": "conversion_bench", "results": []}
    record |= {
        "model": args.model.name,
        "elastic_steps": args.elastic_steps,
        "mask_steps": args.mask_steps,
        "layer_steps": args.layer_steps,
        "evaluation_tokens": blocks[:, 1:].numel(),
        "protocol": encoder.protocol,
    }
    for tokens, seed, name in product(map(int, args.tokens.split(",")), map(int, args.seeds.split(",")), chosen):
        case = {"method": name, "tokens": tokens, "seed": seed}
        done = {result["budget"] for result in record["results"] if case.items() <= result.items()}
        left = [budget for budget in budgets if budget not in done] if known[name].each_budget else budgets if not done else []
        if not left:
            continue
        keep = args.keep and args.keep / f"{re.sub('[^a-z0-9]+', '-', name)}-{tokens}-{seed}"
        for result in run_variant(known[name], source, args.text, tokens, seed, blocks, args.device, left, keep):
            print(json.dumps(case | result), flush=True)
            record["results"].append(case | result)
            write_json(args.out, {**record, **conditions(), "comparison": comparison(record["results"])})
    print(table(record["results"]))
    if args.plot:
        write_text(args.plot, comparison_chart(f"{args.model.name}: perplexity", comparison(record["results"])))
    print(json.dumps({**record, **conditions()}))


if __name__ == "__main__":
    main()
