"""`ladimo convert`: the stages in order, each resumable, and the finished checkpoint renamed into place. No mathematics."""

import dataclasses
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ladimo.checkpoint import (
    FRONTIER,
    choose_device,
    copy_tokenizer,
    moe_config_json,
    read_json,
    resolve_directory,
    stored_dtype,
    write_json,
    write_policy,
    write_tensors,
)
from ladimo.convert.data.calibration import Calibration, Encoder, calibrate
from ladimo.convert.evaluation.measure import measure, num_scored
from ladimo.convert.evaluation.variants import Rules
from ladimo.convert.ffn.expert_layer import full_rule, layer_error
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.methods import Method, get_method
from ladimo.convert.methods.elastic.stages import ElasticStages, solve_layer
from ladimo.convert.parallel import run_jobs
from ladimo.convert.policies.candidates import budget_candidates, routed_candidates
from ladimo.convert.policies.choose import choose_layers, full_cost
from ladimo.convert.policies.frontier import MeasuredPolicies, measure_frontier
from ladimo.convert.policies.routing_profile import LayerProfile, profile_layer
from ladimo.convert.provenance import PROVENANCE, conversion_arguments, device_name, provenance
from ladimo.convert.recipe import PolicyRecipe, Recipe
from ladimo.convert.report.files import policy_entries, write_report
from ladimo.convert.report_figures import depth_curve, initialisation_curves
from ladimo.convert.source import check_source, model_parameters
from ladimo.convert.streamed_model import StreamedModel, load_experts
from ladimo.convert.workspace import Workspace, describe_difference, remove_leftover
from ladimo.model.config import ModelConfig, MoeLayerConfig, moe_layers_to_json
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer

logger = logging.getLogger(__name__)


def convert(
    source: str, out: Path, recipe: Recipe, text: Sequence[Path] | None = None, device: str = "auto", jobs: int = 1
) -> bool:
    """Make the MoE checkpoint OUT from a dense LLaMA; False when OUT is already the result of the same arguments.

    source: a directory or a hub id. text: calibration files, None for the Python standard library. jobs: layers worked on side
    by side, in processes that share the cores (sums taken by another number of threads differ in their last bits). An
    interrupted run with the same arguments resumes and gives the same result. Raises ValueError for a user's mistake, OSError
    when OUT cannot be written; OUT appears whole or not at all.
    """
    directory = resolve_directory(source)
    torch_device = choose_device(device)
    method = get_method(recipe.method)
    config = check_source(directory)
    recipe = method.resolve(recipe, config, torch_device)
    candidates = recipe.candidate_layers(config.num_hidden_layers)
    arguments = conversion_arguments(source, directory, recipe, text, device)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        check_finished(out, arguments)
        remove_leftover(out)
        return False
    workspace = Workspace(out, arguments)
    kind = ElasticConversion if recipe.method == "elastic" else LayerwiseConversion
    run = kind(workspace, method, recipe, StreamedModel(directory, torch_device), candidates)
    calibration = run.calibrate(text)
    run.train(calibration, jobs)
    converted = run.choose_layers(calibration)
    points = run.choose_policies(calibration, converted)
    run.publish(out, arguments, converted, points)
    return True


def check_finished(out: Path, arguments: dict[str, Any]) -> None:
    """Raises ValueError unless OUT is the result of these arguments."""
    if not (out / PROVENANCE).exists():
        raise ValueError(f"{out}: exists and is not a converted checkpoint; nothing was changed")
    difference = describe_difference(read_json(out / PROVENANCE).get("arguments"), arguments)
    if difference:
        raise ValueError(f"{out}: exists, converted with other arguments: {difference}; nothing was changed")


@dataclass(frozen=True)
class Conversion(ABC):
    """One run over a workspace. Everything it makes depends on the arguments alone, never on what was resumed."""

    workspace: Workspace
    method: Method
    recipe: Recipe
    dense: StreamedModel
    candidates: tuple[int, ...]

    def calibrate(self, text: Sequence[Path] | None) -> Calibration:
        def make() -> dict[str, Any]:
            encoder = Encoder(self.dense.directory, self.dense.config)
            made = calibrate(encoder, self.recipe.tokens, self.recipe.seed, text)
            splits = {"fit": made.fit, "holdout": made.holdout, "evaluation": made.evaluation}
            self.workspace.save_tensors("calibration.safetensors", splits)
            counts = {name: num_scored(blocks) for name, blocks in splits.items()}
            return {"tokens": counts, "note": made.note, "protocol": encoder.protocol}

        record = self.workspace.stage("calibration", make)
        tokens = ", ".join(f"{count:,} {name}" for name, count in record["tokens"].items())
        logger.info("text: %s tokens", tokens)
        if record["note"]:
            logger.warning("%s", record["note"])
        return Calibration(**self.workspace.load_tensors("calibration.safetensors"), note=record["note"])

    def train(self, calibration: Calibration, jobs: int) -> None:
        """Every candidate layer on its own: inputs of the original model, seeded by (seed, layer)."""
        missing = [index for index in self.candidates if self.workspace.layer_record(index) is None]
        if len(missing) < len(self.candidates):
            logger.info("resuming: %d of %d layers are done", len(self.candidates) - len(missing), len(self.candidates))
        blocks = torch.cat((calibration.fit, calibration.holdout))
        num_fit = calibration.fit.numel()
        if jobs == 1:
            for index, mlp, inputs, targets in self.dense.ffn_data(blocks, missing):
                self.train_layer(
                    index, mlp, LayerData(inputs[:num_fit], targets[:num_fit], inputs[num_fit:], targets[num_fit:])
                )
            return

        def items() -> Iterator[LayerJob]:
            for index, _, inputs, targets in self.dense.ffn_data(blocks, missing):
                self.workspace.save_tensors(LayerJob.data_name(index), {"inputs": inputs, "targets": targets})
                yield LayerJob(self, index, num_fit)

        for _ in run_jobs(run_layer_job, items(), jobs, max(1, torch.get_num_threads() // jobs)):
            pass

    @abstractmethod
    def train_layer(self, index: int, mlp: GatedMLP, data: LayerData) -> None:
        """One candidate layer, done when its record is in the workspace."""

    @abstractmethod
    def choose_layers(self, calibration: Calibration) -> tuple[int, ...]:
        """The layers to convert, their finished experts in the workspace."""

    @abstractmethod
    def choose_policies(self, calibration: Calibration, converted: tuple[int, ...]) -> MeasuredPolicies:
        """Policies measured on the evaluation text."""

    def publish(
        self,
        out: Path,
        arguments: dict[str, Any],
        converted: tuple[int, ...],
        points: MeasuredPolicies,
    ) -> None:
        config, source = self.config(converted), self.dense.directory

        def write(directory: Path) -> None:
            raw = read_json(source / "config.json")
            write_json(directory / "config.json", moe_config_json(raw, moe_layers_to_json(config.layers)))
            write_tensors(directory, self.tensors(config))
            copy_tokenizer(source, directory)
            for policy in points.policies:
                write_policy(directory, policy)
            write_json(directory / FRONTIER, points.frontier.to_dict())
            write_json(directory / PROVENANCE, provenance(arguments, self.dense.device))
            write_report(directory, self.report(out.name, arguments, converted, points))

        self.workspace.publish(out, write)

    def experts(self, index: int) -> ExpertLayer:
        return load_experts(self.workspace.layer_reader(index), "", self.workspace.layer_config(index), self.dense)

    def record(self, index: int) -> dict[str, Any]:
        record = self.workspace.layer_record(index)
        assert record is not None
        return record

    def config(self, converted: tuple[int, ...]) -> ModelConfig:
        """The model with these layers converted."""
        layers = [self.workspace.layer_config(index) if index in converted else None for index in self._depth]
        return dataclasses.replace(self.dense.config, layers=tuple(layers))

    def tensors(self, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """The converted checkpoint's tensors: the source's, and the experts where a layer is converted."""
        for name, _ in model_parameters(config):
            prefix, _, rest = name.partition(".mlp.")
            index = int(prefix.rpartition(".")[2]) if rest else -1
            if rest and config.layers[index] is not None:
                yield name, self.workspace.layer_reader(index).get(rest)
            else:
                yield name, self.dense.reader.get(name)

    def report(
        self, model: str, arguments: dict[str, Any], converted: tuple[int, ...], points: MeasuredPolicies
    ) -> dict[str, Any]:
        calibration = self.workspace.record("calibration")
        layers, extras = [self.layer_entry(index, converted) for index in self.candidates], self.report_extras()
        return {
            "format": 1,
            "model": model,
            "source": {**arguments["source"], "perplexity": points.dense_perplexity},
            "method": {"name": self.recipe.method, "description": self.method.describe(self.recipe)},
            "recipe": self.recipe.to_dict(),
            "conditions": {
                "text": arguments["text"],
                "tokens": calibration["tokens"],
                "note": calibration["note"],
                "protocol": calibration["protocol"],
                "device": device_name(self.dense.device),
                "dtype": str(self.dense.dtype).removeprefix("torch."),
                "training_seconds": sum(layer["seconds"] for layer in layers) + extras.pop("seconds", 0.0),
            },
            "num_hidden_layers": self.dense.config.num_hidden_layers,
            "layers": layers,
            **extras,
            **policy_entries(points),
        }

    @abstractmethod
    def layer_entry(self, index: int, converted: tuple[int, ...]) -> dict[str, Any]:
        """A candidate layer's entry in report.json."""

    @abstractmethod
    def report_extras(self) -> dict[str, Any]:
        """Keys of report.json that this kind of conversion has beside those all have; "seconds": of training besides the
        layers'."""

    @property
    def _depth(self) -> range:
        return range(self.dense.config.num_hidden_layers)


class LayerwiseConversion(Conversion):
    """Methods whose layers are finished one by one: train, scan single-layer swaps, convert the least damaging first."""

    def train_layer(self, index: int, mlp: GatedMLP, data: LayerData) -> None:
        started = time.monotonic()
        generator = torch.Generator().manual_seed(self.recipe.seed * 100_003 + index)
        layer = self.method.split(mlp, data, self.recipe, generator)
        initial = layer_error(layer, data.holdout_inputs, data.holdout_targets)
        curve = self.method.fit(layer, data, self.recipe, generator)
        self.workspace.save_layer(index, layer, stored_dtype(self.dense.directory))
        stored = load_experts(self.workspace.layer_reader(index), "", layer.config, self.dense)
        profile = profile_layer(stored, data.holdout_inputs, data.holdout_targets, recipe_taus(self.recipe.policies))
        record = {
            "curve": [asdict(point) for point in curve],
            "initial_error": initial,
            "error": profile.by_top_k[-1].error,
            "profile": profile.to_dict(),
            "seconds": time.monotonic() - started,
        }
        self.workspace.finish_layer(index, layer.config, record)
        logger.info(
            "layer %d: holdout error %.3f -> %.3f of the FFN's variance, best expert's weight %.2f, %.0f s",
            index, initial, record["error"], profile.mean_best_weight, record["seconds"],
        )  # fmt: skip

    def choose_layers(self, calibration: Calibration) -> tuple[int, ...]:
        """Scan single-layer swaps on the holdout and, under `auto`, convert the least damaging layers first."""

        def make() -> dict[str, Any]:
            depth = self.dense.config.num_hidden_layers
            none: Rules = (None,) * depth
            swapped: dict[int, Rules] = {}
            for index in self.candidates:
                rule = full_rule(self.experts(index))
                swapped[index] = tuple(rule if layer == index else None for layer in range(depth))
            measured = measure(self.dense, self.experts, calibration.holdout, [none, *swapped.values()])
            damage = {index: measured[rules].perplexity for index, rules in swapped.items()}
            chosen = self.candidates
            if self.recipe.layers == "auto":
                savings = {index: 1.0 - full_cost(self.config((index,))) for index in self.candidates}
                chosen = choose_layers(damage, savings, self.recipe.target_active)
            return {
                "dense_perplexity": measured[none].perplexity,
                "perplexity": {str(index): value for index, value in damage.items()},
                "converted": list(chosen),
                "active_parameters_ratio": full_cost(self.config(chosen)),
            }

        record = self.workspace.stage("sensitivity", make)
        self.workspace.stage("experiments", lambda: self.experiments(calibration, record["perplexity"]))
        for index, value in record["perplexity"].items():
            ratio = value / record["dense_perplexity"]
            logger.info("layer %s alone converted: perplexity %.3f (dense x %.3f)", index, value, ratio)
        cost = record["active_parameters_ratio"]
        logger.info("converting layers %s: %.1f%% active parameters", record["converted"], 100 * cost)
        if self.recipe.layers == "auto" and cost > self.recipe.target_active:
            logger.warning("all layers converted; the target of %.1f%% is out of reach", 100 * self.recipe.target_active)
        return tuple(record["converted"])

    def experiments(self, calibration: Calibration, damage: Mapping[str, float]) -> dict[str, Any]:
        """What only the report shows: more and more layers converted, and where there is training, what the split start gives
        it in the middle layer."""
        order = sorted(self.candidates, key=lambda index: damage[str(index)])
        found: dict[str, Any] = {
            "depth": depth_curve(self.dense, self.experts, self.config(self.candidates), order, calibration.holdout)
        }
        middle = self.candidates[len(self.candidates) // 2]
        if self.record(middle)["curve"] and self.recipe.method != "moefication":  # which trains no expert
            blocks, cut = torch.cat((calibration.fit, calibration.holdout)), calibration.fit.numel()
            for _, mlp, inputs, targets in self.dense.ffn_data(blocks, [middle]):
                data = LayerData(inputs[:cut], targets[:cut], inputs[cut:], targets[cut:])
                found["initialisation"] = initialisation_curves(self.method, mlp, data, self.recipe, middle)
        return found

    def choose_policies(self, calibration: Calibration, converted: tuple[int, ...]) -> MeasuredPolicies:
        def make() -> dict[str, Any]:
            profiles = {index: LayerProfile.from_dict(self.record(index)["profile"]) for index in converted}
            config = self.config(converted)
            candidates, guard = routed_candidates(self.dense, self.experts, config, profiles, calibration.holdout, self.recipe)
            blocks = calibration.evaluation
            return measure_frontier(self.dense, self.experts, config, candidates, blocks, guard).to_dict()

        return MeasuredPolicies.from_dict(self.workspace.stage("policies", make))

    def layer_entry(self, index: int, converted: tuple[int, ...]) -> dict[str, Any]:
        damage = self.workspace.record("sensitivity")["perplexity"][str(index)]
        record = self.record(index)
        return {"layer": index, "converted": index in converted, "converted_alone_perplexity": damage, **record}

    def report_extras(self) -> dict[str, Any]:
        sensitivity = self.workspace.record("sensitivity")
        return {"holdout_dense_perplexity": sensitivity["dense_perplexity"], **self.workspace.record("experiments")}


class ElasticConversion(Conversion):
    """Method elastic: every layer is solved alone; widths, substitutes and policies are decided for the whole model."""

    def train_layer(self, index: int, mlp: GatedMLP, data: LayerData) -> None:
        started = time.monotonic()
        record = solve_layer(self.workspace, index, mlp, data, self.recipe, bool(self.stages.contested))
        record["seconds"] = time.monotonic() - started
        experts = self.recipe.split.experts
        whole = MoeLayerConfig(experts, experts, -(-mlp.gate_proj.out_features // experts), expert_weight="one", router="none")
        self.workspace.finish_layer(index, whole, record)
        half = record["nested"]["errors"].get(str(experts // 2), 0.0)
        logger.info("layer %d: holdout error %.3f of the FFN's variance at half width, %.0f s", index, half, record["seconds"])

    def choose_layers(self, calibration: Calibration) -> tuple[int, ...]:
        plans = self.stages.plans(*self.stages.damage(calibration.holdout))
        self.stages.substitutes(plans, calibration.fit, calibration.holdout)
        self.stages.finish(stored_dtype(self.dense.directory))
        return self.stages.converted()

    def choose_policies(self, calibration: Calibration, converted: tuple[int, ...]) -> MeasuredPolicies:
        def make() -> dict[str, Any]:
            config, named = self.config(converted), self.stages.policies()
            candidates, guard = budget_candidates(
                self.dense, self.experts, config, named, calibration.holdout[: self._scanned(calibration)], self.recipe
            )
            blocks = calibration.evaluation
            return measure_frontier(self.dense, self.experts, config, candidates, blocks, guard).to_dict()

        return MeasuredPolicies.from_dict(self.workspace.stage("policies", make))

    def layer_entry(self, index: int, converted: tuple[int, ...]) -> dict[str, Any]:
        damage = self.workspace.record("damage")["damage"][str(index)]
        return {"layer": index, "converted": index in converted, "damage": damage, **self.record(index)}

    def report_extras(self) -> dict[str, Any]:
        trained, stages = self.workspace.record("substitutes"), self.stages
        targets = self.recipe.elastic.budgets
        budgets = [
            {
                "policy": name,
                "target": targets[plan.budget],
                "widths": list(plan.widths),
                "routed": list(plan.routed),
                "curve": entry["curve"],
                "layer_errors": entry.get("layer_errors", {}),
            }
            for name, plan, entry in zip(stages.names(), stages.kept, trained["kept"], strict=True)
        ]
        ratio = stages.stored_ratio(self.config(stages.converted()))
        elastic = {"budgets": budgets, "experts": self.recipe.split.experts, "stored_ratio": ratio}
        return {"elastic": elastic, "seconds": trained["seconds"]}

    @property
    def stages(self) -> ElasticStages:
        return ElasticStages(self.workspace, self.recipe, self.dense, self.candidates)

    def _scanned(self, calibration: Calibration) -> int:
        return max(1, self.recipe.elastic.scan_tokens // calibration.holdout.shape[1])


@dataclass(frozen=True, slots=True)
class LayerJob:
    """One layer for a worker process; its data are in a file."""

    conversion: Conversion
    index: int
    num_fit: int

    def __str__(self) -> str:
        return f"layer {self.index}"

    @staticmethod
    def data_name(index: int) -> str:
        return f"layers/{index}/data.safetensors"

    def __reduce__(self) -> tuple[Any, ...]:
        run = self.conversion
        place = (run.workspace.out, run.workspace.arguments, run.dense.directory, str(run.dense.device))
        return _layer_job, (type(run), *place, run.recipe, run.candidates, self.index, self.num_fit)


def _layer_job(
    kind: type[Conversion],
    out: Path,
    arguments: dict[str, Any],
    directory: Path,
    device: str,
    recipe: Recipe,
    candidates: tuple[int, ...],
    index: int,
    num_fit: int,
) -> LayerJob:
    dense = StreamedModel(directory, torch.device(device))
    run = kind(Workspace(out, arguments), get_method(recipe.method), recipe, dense, candidates)
    return LayerJob(run, index, num_fit)


def run_layer_job(job: LayerJob) -> None:
    run, name = job.conversion, LayerJob.data_name(job.index)
    data = run.workspace.load_tensors(name)
    inputs, targets = data["inputs"], data["targets"]
    mlp = run.dense.layer(job.index).mlp
    assert isinstance(mlp, GatedMLP)
    cut = job.num_fit
    run.train_layer(job.index, mlp, LayerData(inputs[:cut], targets[:cut], inputs[cut:], targets[cut:]))
    run.workspace.remove(name)


def recipe_taus(policies: PolicyRecipe) -> tuple[float, ...]:
    """The taus that a profile must have besides its own grid."""
    return (policies.quality, policies.balanced, policies.fast)
