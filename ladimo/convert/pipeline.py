"""`ladimo convert`: runs the stages in order. Each stage can be resumed. At the end, the checkpoint is renamed to its place."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ladimo.checkpoint import (
    FRONTIER,
    choose_device,
    copy_tokenizer,
    moe_config_json,
    read_config,
    read_json,
    resolve_directory,
    write_json,
    write_policy,
    write_tensors,
)
from ladimo.convert.data.calibration import Calibration, Encoder, calibrate
from ladimo.convert.evaluation.measure import num_scored
from ladimo.convert.methods.automatic import choose_method
from ladimo.convert.methods.base import Converted, Method
from ladimo.convert.methods.registry import METHODS, get_method
from ladimo.convert.policies.candidates import ConvertedModel
from ladimo.convert.policies.frontier import MeasuredPolicies, measure_frontier
from ladimo.convert.provenance import PROVENANCE, conversion_arguments, device_name, provenance
from ladimo.convert.recipe import Recipe
from ladimo.convert.report_files import policy_entries, prefill_costs, write_report
from ladimo.convert.run import Run
from ladimo.convert.source import check_source
from ladimo.convert.streamed_model import StreamedModel
from ladimo.convert.workspace import Workspace, describe_difference, remove_leftover
from ladimo.model.config import ModelConfig, moe_layers_to_json

logger = logging.getLogger(__name__)


def convert(
    source: str,
    out: Path,
    recipe: Recipe,
    text: Sequence[Path] | None = None,
    device: str = "auto",
    jobs: int | None = 1,
    ray: str | None = None,
) -> bool:
    """Make the MoE checkpoint OUT from a dense LLaMA. Returns False if OUT is already the result of the same arguments.

    source: a directory or a hub id. text: calibration files; None: Python's standard library. jobs: layers to convert in
    parallel, in processes that share the cores. With another number of threads, the last bits of sums differ. ray: the
    address of a Ray cluster that converts the layers instead (`ray_jobs`), `jobs` at once, or with None as many as it can. An
    interrupted run resumes with the same arguments and gives the same result. OUT appears only when it is complete. Raises
    ValueError for a user's mistake, and OSError if OUT cannot be written.
    """
    directory = resolve_directory(source)
    torch_device = choose_device(device)
    name, reason = choose_method(recipe)
    method, recipe = get_method(name), dataclasses.replace(recipe, method=name)
    check_fit(method, read_config(directory))
    check_parallel(method, jobs, ray)
    config = check_source(directory)
    recipe = method.resolve(recipe, config, torch_device)
    logger.info("method: %s, %s", name, reason)
    candidates = recipe.candidate_layers(config.num_hidden_layers)
    arguments = conversion_arguments(source, directory, recipe, text, device)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        check_finished(out, arguments)
        remove_leftover(out)
        return False
    run = Run(Workspace(out, arguments), recipe, StreamedModel(directory, torch_device), candidates, jobs, ray)
    calibration = calibrated(run, text)
    converted = method.convert(run, calibration)
    points = measured(run, converted, calibration.evaluation)
    publish(run, out, arguments, converted, points)
    return True


def check_parallel(method: Method, jobs: int | None, ray: str | None) -> None:
    """Raises ValueError if the layers are to be converted in parallel, and the method cannot do that."""
    if method.parallel or (jobs == 1 and ray is None):
        return
    able = [name for name, other in METHODS.items() if other.parallel]
    raise ValueError(
        f"method {method.name!r} does not convert layers in parallel (--jobs, --ray); "
        f"methods that do: {', '.join(able) or 'none'}"
    )


def check_fit(method: Method, config: ModelConfig) -> None:
    """Raises ValueError if the method cannot convert the FFNs of this family."""
    if config.ffn_kind not in method.ffn_kinds:
        able = [name for name, other in METHODS.items() if config.ffn_kind in other.ffn_kinds]
        raise ValueError(
            f"method {method.name!r} does not convert family {config.family!r}, whose FFNs have no gate; "
            f"methods that do: {', '.join(able) or 'none'}"
        )


def check_finished(out: Path, arguments: dict[str, Any]) -> None:
    """Raises ValueError unless OUT is the result of these arguments. If the recipe of OUT lacks a newer key, the key's default
    counts."""
    if not (out / PROVENANCE).exists():
        raise ValueError(f"{out}: exists and is not a converted checkpoint; nothing was changed")
    stored = read_json(out / PROVENANCE).get("arguments")
    if isinstance(stored, dict) and isinstance(stored.get("recipe"), dict):
        stored = {**stored, "recipe": _with_defaults(stored["recipe"])}
    difference = describe_difference(stored, arguments)
    if difference:
        raise ValueError(f"{out}: exists, converted with other arguments: {difference}; nothing was changed")


def calibrated(run: Run, text: Sequence[Path] | None) -> Calibration:
    """The stage that cuts the conversion's text into token blocks."""

    def make() -> dict[str, Any]:
        encoder = Encoder(run.dense.directory, run.dense.config)
        made = calibrate(encoder, run.recipe.tokens, run.recipe.seed, text)
        splits = {"fit": made.fit, "holdout": made.holdout, "evaluation": made.evaluation}
        run.workspace.save_tensors("calibration.safetensors", splits)
        counts = {name: num_scored(blocks) for name, blocks in splits.items()}
        return {"tokens": counts, "note": made.note, "protocol": encoder.protocol}

    record = run.workspace.stage("calibration", make)
    logger.info("text: %s tokens", ", ".join(f"{count:,} {name}" for name, count in record["tokens"].items()))
    if record["note"]:
        logger.warning("%s", record["note"])
    return Calibration(**run.workspace.load_tensors("calibration.safetensors"), note=record["note"])


def measured(run: Run, converted: Converted, blocks: Tensor) -> MeasuredPolicies:
    """The stage that measures the policies on token blocks [B, S], and makes the frontier."""

    def make() -> dict[str, Any]:
        model = ConvertedModel(run.dense, run.experts, run.config(converted.layers))
        if converted.own is not None:
            model = ConvertedModel.of(converted.own, run.dense)
        return measure_frontier(model, converted.candidates(model), blocks).to_dict()

    return MeasuredPolicies.from_dict(run.workspace.stage("policies", make))


def publish(run: Run, out: Path, arguments: dict[str, Any], converted: Converted, points: MeasuredPolicies) -> None:
    """Write the checkpoint, and rename it to OUT."""
    config, source = run.config(converted.layers), run.dense.directory

    def write(directory: Path) -> None:
        if converted.own is None:
            raw = read_json(source / "config.json")
            write_json(directory / "config.json", moe_config_json(raw, moe_layers_to_json(config.layers)))
            write_tensors(directory, run.tensors(config))
        else:
            reader = converted.own.reader
            write_json(directory / "config.json", read_json(reader.directory / "config.json"))
            write_tensors(directory, ((name, reader.get(name)) for name in reader.files))
        copy_tokenizer(source, directory)
        for policy in points.policies:
            write_policy(directory, policy)
        write_json(directory / FRONTIER, points.frontier.to_dict())
        write_json(directory / PROVENANCE, provenance(arguments, run.dense.device))
        write_report(directory, report(run, out.name, arguments, converted, points))

    run.workspace.publish(out, write)


def report(run: Run, model: str, arguments: dict[str, Any], converted: Converted, points: MeasuredPolicies) -> dict[str, Any]:
    """The content of report.json."""
    calibration, method = run.workspace.record("calibration"), get_method(run.recipe.method)
    costs = None if converted.own is None else prefill_costs(converted.own)
    config = run.config(converted.layers) if converted.own is None else converted.own.config
    return {
        "format": 1,
        "model": model,
        "source": {**arguments["source"], "perplexity": points.dense_perplexity},
        "method": {"name": method.name, "description": method.describe(run.recipe)},
        "recipe": run.recipe.to_dict(),
        "conditions": {
            "text": arguments["text"],
            "tokens": calibration["tokens"],
            "note": calibration["note"],
            "protocol": calibration["protocol"],
            "device": device_name(run.dense.device),
            "dtype": str(run.dense.dtype).removeprefix("torch."),
            "training_seconds": sum(entry["seconds"] for entry in converted.entries) + converted.seconds,
            "prefill_costs": None if costs is None else costs.to_dict(),
        },
        "num_hidden_layers": run.dense.config.num_hidden_layers,
        "layers": converted.entries,
        **converted.report,
        **policy_entries(points, config, costs),
    }


def _with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    try:
        return Recipe.from_dict(recipe).to_dict()
    except ValueError:  # made by a version with other keys
        return recipe
