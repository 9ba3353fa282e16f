"""The command `ladimo`: parses arguments, calls the library, prints results. Exit codes: 0 done, 1 failed, 2 bad usage."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import ladimo
from ladimo.checkpoint import read_config, read_frontier, read_json, read_policies, resolve_directory
from ladimo.convert.evaluate_checkpoint import evaluate_checkpoint
from ladimo.convert.methods.registry import METHODS
from ladimo.convert.pipeline import convert
from ladimo.convert.progress import reporting
from ladimo.convert.recipe import AUTO, LAYERS_PATTERN, Recipe, load_recipe
from ladimo.convert.report.outside import read_comparison, read_throughput
from ladimo.convert.report_files import REPORT, measured_policies, render_report
from ladimo.convert.reprofile import reprofile
from ladimo.convert.stock.prune import prune
from ladimo.export import export, targets

logger = logging.getLogger("ladimo")


class ProgressHandler(logging.Handler):
    """Writes log lines to stderr without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    handler = ProgressHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with reporting():
            options.run(options)
    except KeyboardInterrupt:
        print("ladimo: interrupted; the same command resumes a conversion", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        print(f"ladimo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except Exception as error:
        if options.debug:
            raise
        message = " ".join(str(error).split())
        print(f"ladimo: unexpected {type(error).__name__}: {message} (--debug shows where)", file=sys.stderr)
        return 1
    finally:
        logger.removeHandler(handler)
    return 0


def build_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    on_device = argparse.ArgumentParser(add_help=False)
    on_device.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto, which is CUDA if there is a GPU)"
    )
    with_dense = argparse.ArgumentParser(add_help=False)
    with_dense.add_argument("--dense", type=Path, metavar="DIR", help="the dense source, if it has moved since the conversion")

    parser = argparse.ArgumentParser(
        prog="ladimo",
        description="Turn a dense LLaMA into a Mixture-of-Experts, and measure what that costs.",
        epilog="`ladimo COMMAND --help` explains a command. Exit codes: 0 done, 1 failed, 2 bad usage.",
    )
    parser.add_argument("--version", action="version", version=f"ladimo {ladimo.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser(
        "convert",
        parents=[on_device, common],
        help="make a MoE checkpoint from a dense LLaMA",
        description="Make the MoE checkpoint OUT from DENSE. After an interruption the same command resumes. Flags override "
        "the recipe. Progress is a bar on a terminal, otherwise a line at least every 30 seconds.",
        epilog="Which method: auto takes nested. If --experts, --top-k, --target-active or numbers of layers are given, it "
        "takes elastic. The first line of output says which one and why. nested changes bits; elastic changes parameters and "
        "stores copies of what its budgets keep. tomoe and disp change and copy no weight; tomoe routes by token, disp does "
        "not. ladimo, cmoe and moefication follow their papers, and static is the baseline. docs/choosing-a-method.md has the "
        "measurements.",
    )
    command.add_argument("source", metavar="DENSE", help="directory of the dense model in Hugging Face layout, or a hub id")
    command.add_argument("out", metavar="OUT", type=Path, help="directory to make; it appears only when it is complete")
    command.add_argument("--method", choices=[AUTO, *sorted(METHODS)], help="conversion method (default: auto, see below)")
    command.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE", help="calibration text, UTF-8 (default: Python's standard library)"
    )
    command.add_argument("--tokens", type=int, metavar="N", help="calibration tokens (default: 100000)")
    command.add_argument(
        "--experts", type=int, metavar="E", help="experts per converted layer (default: 8); not in method nested"
    )
    command.add_argument("--top-k", type=int, metavar="K", help="experts per token in methods that train a router (default: 2)")
    command.add_argument("--layers", type=layers_flag, metavar="auto|all|0,3,5-9", help="layers to convert (default: auto)")
    command.add_argument(
        "--target-active",
        type=float,
        metavar="R",
        help="share of the dense model's active parameters to reach (default: 0.8); not in method nested",
    )
    command.add_argument(
        "--max-perplexity-ratio",
        type=float,
        metavar="R",
        help="add the cheapest policy whose perplexity is at most R times that of the dense model",
    )
    command.add_argument(
        "--top-bits",
        type=int,
        choices=[8, 16],
        help="method nested: the most bits of a stored weight; 8 halves the checkpoint (default: 16)",
    )
    command.add_argument("--recipe", type=Path, metavar="FILE.toml", help="values for all of these flags, and for the training")
    command.add_argument("--seed", type=int, help="random seed (default: 0)")
    command.add_argument(
        "--jobs",
        type=positive_flag,
        metavar="N",
        help="layers to convert in parallel (default: 1; with --ray, as many as the cluster can); not in the methods nested, "
        "tomoe and disp",
    )
    command.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="convert the layers in a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or local for a cluster on this "
        "machine; not in the methods nested, tomoe and disp. DENSE and OUT must have the same path on every machine",
    )
    command.set_defaults(run=run_convert)

    command = commands.add_parser(
        "evaluate",
        parents=[with_dense, on_device, common],
        help="measure perplexity and cost of policies on a text",
        description="Measure a model's policies: perplexity, cost and agreement with the dense source. Dense models work, too.",
    )
    command.add_argument("model", metavar="MODEL", help="checkpoint directory, or a hub id")
    command.add_argument("--text", type=Path, metavar="FILE", required=True, help="text to score, UTF-8")
    command.add_argument("--policy", default="all", metavar="NAME|all", help="policy to measure (default: all)")
    command.add_argument(
        "--tokens", type=positive_flag, metavar="N", help="score the first N tokens, in whole blocks (default: all)"
    )
    command.add_argument(
        "--task",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="files of BLiMP, ARC, PIQA, OpenBookQA, MMLU, WinoGrande or LAMBADA, or directories of such files",
    )
    command.add_argument("--items", type=positive_flag, metavar="N", help="the first N items of each task (default: all)")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run_evaluate)

    command = commands.add_parser(
        "profile",
        parents=[with_dense, on_device, common],
        help="rebuild policies and frontier for another text, without training",
        description="Measure the routing weights on another text, and rebuild policies, frontier and report in place.",
    )
    command.add_argument("model", metavar="MODEL", help="directory of a converted checkpoint, or of a model trained as MoE")
    command.add_argument(
        "--text", type=Path, metavar="FILE", required=True, help="text of the kind that the model will serve, UTF-8"
    )
    command.set_defaults(run=run_profile)

    command = commands.add_parser("policies", parents=[common], help="list a model's policies with versions and figures")
    command.add_argument("model", metavar="MODEL", help="checkpoint directory")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run_policies)

    command = commands.add_parser(
        "prune",
        parents=[common],
        help="leave out experts of a Mixtral, Qwen2-MoE or OLMoE model",
        description="Write MODEL with fewer experts in every layer, as a checkpoint of the same model type. The experts that "
        "add least are left out, by REAP's score, which `ladimo profile` measures.",
    )
    command.add_argument("model", metavar="MODEL", help="checkpoint directory, after `ladimo profile`")
    command.add_argument("out", metavar="OUT", type=Path, help="directory to make; it appears only when it is complete")
    command.add_argument("--experts", type=positive_flag, metavar="N", required=True, help="experts to keep in each layer")
    command.set_defaults(run=run_prune)

    command = commands.add_parser(
        "export",
        parents=[common],
        help="write a model for other programs",
        description="Write MODEL, as it runs under one policy, for programs that do not know routing policies. Before OUT "
        "appears, it is read back in transformers and compared with MODEL.",
        epilog="Targets: " + "; ".join(f"{name}: {target.help}" for name, target in targets().items()) + ".",
    )
    command.add_argument("model", metavar="MODEL", help="checkpoint directory")
    command.add_argument("out", metavar="OUT", type=Path, help="directory to make; it appears only when it is complete")
    command.add_argument("--policy", default="full", metavar="NAME", help="the policy that it runs under (default: full)")
    command.add_argument("--target", choices=list(targets()), default="dense", help="form to write (default: dense)")
    command.add_argument(
        "--head-bits",
        type=positive_flag,
        metavar="N",
        help="of method nested: read so many bits of the output head, 4 or 8, for every word, whatever the policy says",
    )
    command.add_argument(
        "--float32",
        action="store_true",
        help="write weights in fp32: exact where a policy reads fewer bits, too",
    )
    command.set_defaults(run=run_export)

    command = commands.add_parser("report", parents=[common], help="render report.md and report.html from report.json again")
    command.add_argument("model", metavar="MODEL", help="converted checkpoint directory")
    command.add_argument(
        "--comparison", type=Path, metavar="FILE", help="JSON of loadtests.conversion_bench: methods at equal budgets"
    )
    command.add_argument(
        "--throughput", type=Path, metavar="FILE", help="JSON of loadtests.engine_bench: decoding speed by policy"
    )
    command.set_defaults(run=run_report)
    return parser


def layers_flag(value: str) -> str:
    if not LAYERS_PATTERN.fullmatch(value):
        raise argparse.ArgumentTypeError(f"{value!r} is not auto, all, or numbers and ranges such as 0,3,5-9")
    return value


def positive_flag(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive whole number")
    return int(value)


def run_convert(options: argparse.Namespace) -> None:
    recipe = (load_recipe(options.recipe) if options.recipe else Recipe()).override(
        {
            "method": options.method,
            "tokens": options.tokens,
            "layers": options.layers,
            "target_active": options.target_active,
            "max_perplexity_ratio": options.max_perplexity_ratio,
            "seed": options.seed,
            "split.experts": options.experts,
            "split.top_k": options.top_k,
            "nested.top_bits": options.top_bits,
        }
    )
    jobs = options.jobs or (None if options.ray else 1)
    made = convert(options.source, options.out, recipe, options.text, options.device, jobs, options.ray)
    if not made:
        print(f"{options.out}: is complete already, with the same arguments; nothing was changed")
        return
    report = read_json(options.out / REPORT)
    print_figures(report["policies"], report["source"]["perplexity"])
    print(f"{options.out}: done; report.md and report.html describe the result")


def run_evaluate(options: argparse.Namespace) -> None:
    result = evaluate_checkpoint(
        options.model,
        options.text,
        options.policy,
        options.tokens,
        options.dense,
        options.device,
        options.task,
        options.items,
    )
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['text']}: {result['tokens']:,} tokens scored")
    print_figures(result["policies"], result["dense"]["perplexity"])
    for task in result.get("tasks", ()):
        print_task(task)


def run_profile(options: argparse.Namespace) -> None:
    report = reprofile(options.model, options.text, options.dense, options.device)
    print_figures(report["policies"], report["source"]["perplexity"])


def run_policies(options: argparse.Namespace) -> None:
    directory = resolve_directory(options.model)
    policies = read_policies(directory, read_config(directory))
    frontier = read_frontier(directory)
    measured = {entry["policy"]: entry for entry in measured_policies(directory)}
    entries = [
        {
            **policy.to_dict(),
            "version": policy.version,
            # Figures belong to the measured rules. They are not shown for a policy that was edited later.
            "figures": figures if (figures := measured.get(name)) and figures["version"] == policy.version else None,
        }
        for name, policy in policies.items()
    ]
    if options.json:
        points = frontier.to_dict()["points"] if frontier else []
        print(json.dumps({"model": options.model, "policies": entries, "frontier": points}))
        return
    for entry in entries:
        figures = entry["figures"]
        cost = "not measured"
        if figures:
            share = figures.get("bytes_ratio", figures["active_parameters_ratio"])
            cost = f"{100 * share:5.1f}%  perplexity {figures['perplexity']:.3f}"
        print(f"{entry['name']:<12} {entry['version']}  {cost}  {entry['description']}")


def run_prune(options: argparse.Namespace) -> None:
    kept = prune(options.model, options.out, options.experts)
    print(f"{options.out}: written with {options.experts} experts in each of {len(kept)} layers")


def run_export(options: argparse.Namespace) -> None:
    export(options.model, options.out, options.target, options.policy, options.head_bits, options.float32)
    print(f"{options.out}: written for {options.target}, under policy {options.policy}")


def run_report(options: argparse.Namespace) -> None:
    directory = resolve_directory(options.model)
    outside: dict[str, Any] = {}
    if options.comparison:
        outside["comparison"] = read_comparison(options.comparison)
    if options.throughput:
        outside["throughput"] = read_throughput(options.throughput)
    render_report(directory, outside)
    print(f"{directory / 'report.md'} and {directory / 'report.html'} written")


def print_figures(entries: Sequence[dict[str, Any]], dense: float | None) -> None:
    # Where policies read fewer bits, their cost is the bytes that they read.
    cost = "bytes_ratio" if any(entry.get("bytes_ratio") for entry in entries) else "active_parameters_ratio"
    title = "bytes" if cost == "bytes_ratio" else "active"
    print(f"{'policy':<12} {title:>7} {'perplexity':>11} {'to dense':>9} {'agreement':>10}")
    print(f"{'dense':<12} {'100.0%':>7} {_cell(dense, '.3f'):>11} {'1.000':>9}")
    for entry in entries:
        cells = (
            f"{_cell(100 * entry[cost], '.1f')}%",
            _cell(entry["perplexity"], ".3f"),
            _cell(entry["perplexity_ratio"], ".3f"),
            _cell(entry["next_token_agreement"], ".3f"),
        )
        print(f"{entry['policy']:<12} {cells[0]:>7} {cells[1]:>11} {cells[2]:>9} {cells[3]:>10}")


def print_task(task: dict[str, Any]) -> None:
    left_out = "".join(f", {task[key]} {key}" for key in ("skipped", "truncated") if task[key])
    print(f"\n{task['task']} ({task['form']}): {task['items']:,} items{left_out}")
    print(f"{'policy':<12} {'accuracy':>8} {'stderr':>7} {'acc_norm':>9} {'stderr':>7} {'perplexity':>11}")
    for entry in ([{"policy": "dense", **task["dense"]}] if task["dense"] else []) + task["policies"]:
        cells = [_cell(entry[key], ".3f") for key in ("accuracy", "stderr", "acc_norm", "acc_norm_stderr", "perplexity")]
        print(f"{entry['policy']:<12} {cells[0]:>8} {cells[1]:>7} {cells[2]:>9} {cells[3]:>7} {cells[4]:>11}")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
