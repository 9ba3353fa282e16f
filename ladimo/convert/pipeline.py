"""`ladimo convert`: the stages in order, each resumable, and the finished checkpoint renamed into place. No mathematics."""

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ladimo.checkpoint import (
    FRONTIER,
    TensorReader,
    choose_device,
    copy_tokenizer,
    moe_config_json,
    read_config,
    read_json,
    resolve_directory,
    stored_dtype,
    write_json,
    write_policy,
    write_tensors,
)
from ladimo.convert.calibration import Calibration, Encoder, calibrate
from ladimo.convert.choose_policy import Rules, choose_layers, full_cost
from ladimo.convert.distill import LayerData, full_rule, layer_error
from ladimo.convert.evaluate import measure, num_scored
from ladimo.convert.methods import Method, get_method
from ladimo.convert.operating_points import OperatingPoints, measure_operating_points
from ladimo.convert.profile import LayerProfile, profile_layer
from ladimo.convert.provenance import PROVENANCE, conversion_arguments, device_name, provenance
from ladimo.convert.recipe import PolicyRecipe, Recipe
from ladimo.convert.report import policy_entries, write_report
from ladimo.convert.teacher import StreamedModel
from ladimo.convert.workspace import Workspace, describe_difference, remove_leftover
from ladimo.model.config import ModelConfig, MoeLayerConfig, moe_layers_to_json
from ladimo.model.moe import ExpertLayer
from ladimo.model.transformer import MoeTransformer

logger = logging.getLogger(__name__)


def convert(source: str, out: Path, recipe: Recipe, text: Sequence[Path] | None = None, device: str = "auto") -> bool:
    """Make the MoE checkpoint OUT from a dense LLaMA; False when OUT is already the result of the same arguments.

    source: a directory or a hub id. text: calibration files, None for the Python standard library. An interrupted run with the
    same arguments resumes and gives the same result. Raises ValueError for a user's mistake, OSError when OUT cannot be
    written; OUT appears whole or not at all.
    """
    directory = resolve_directory(source)
    torch_device = choose_device(device)
    method = get_method(recipe.method)
    config = check_source(directory)
    candidates = recipe.candidate_layers(config.num_hidden_layers)
    arguments = conversion_arguments(source, directory, recipe, text, device)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        check_finished(out, arguments)
        remove_leftover(out)
        return False
    workspace = Workspace(out, arguments)
    run = Conversion(workspace, method, recipe, StreamedModel(directory, torch_device), candidates)
    calibration = run.calibrate(text)
    run.train(calibration)
    converted = run.choose_layers(calibration)
    points = run.choose_policies(calibration, converted)
    run.publish(out, arguments, calibration, converted, points)
    return True


def check_source(directory: Path) -> ModelConfig:
    """Raises ValueError unless this is a whole dense LLaMA: every tensor there, of the right shape."""
    config = read_config(directory)
    if config.moe_layer_indices:
        raise ValueError(f"{directory}: is converted already; give the dense model")
    reader = TensorReader(directory)
    for name, parameter in _parameters(config):
        if name not in reader or reader.shape(name) != tuple(parameter.shape):
            found = f"has shape {list(reader.shape(name))}" if name in reader else "is missing"
            raise ValueError(f"{directory}: {name} {found}, config.json asks for {list(parameter.shape)}")
    stored_dtype(directory)
    return config


def check_finished(out: Path, arguments: dict[str, Any]) -> None:
    """Raises ValueError unless OUT is the result of these arguments."""
    if not (out / PROVENANCE).exists():
        raise ValueError(f"{out}: exists and is not a converted checkpoint; nothing was changed")
    difference = describe_difference(read_json(out / PROVENANCE).get("arguments"), arguments)
    if difference:
        raise ValueError(f"{out}: exists, converted with other arguments: {difference}; nothing was changed")


@dataclass(frozen=True, slots=True)
class Conversion:
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

    def train(self, calibration: Calibration) -> None:
        """Every candidate layer on its own: inputs of the original model, seeded by (seed, layer)."""
        missing = [index for index in self.candidates if self.workspace.layer_record(index) is None]
        if len(missing) < len(self.candidates):
            logger.info("resuming: %d of %d layers are trained", len(self.candidates) - len(missing), len(self.candidates))
        blocks = torch.cat((calibration.fit, calibration.holdout))
        num_fit = calibration.fit.numel()
        for index, mlp, inputs, targets in self.dense.ffn_data(blocks, missing):
            started = time.monotonic()
            data = LayerData(inputs[:num_fit], targets[:num_fit], inputs[num_fit:], targets[num_fit:])
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
        for index, value in record["perplexity"].items():
            ratio = value / record["dense_perplexity"]
            logger.info("layer %s alone converted: perplexity %.3f (dense x %.3f)", index, value, ratio)
        cost = record["active_parameters_ratio"]
        logger.info("converting layers %s: %.1f%% active parameters", record["converted"], 100 * cost)
        if self.recipe.layers == "auto" and cost > self.recipe.target_active:
            logger.warning("all layers converted; the target of %.1f%% is out of reach", 100 * self.recipe.target_active)
        return tuple(record["converted"])

    def choose_policies(self, calibration: Calibration, converted: tuple[int, ...]) -> OperatingPoints:
        def make() -> dict[str, Any]:
            profiles = {index: LayerProfile.from_dict(self.record(index)["profile"]) for index in converted}
            blocks, policies = calibration.evaluation, self.recipe.policies
            return measure_operating_points(
                self.dense, self.experts, self.config(converted), profiles, blocks, policies
            ).to_dict()

        return OperatingPoints.from_dict(self.workspace.stage("policies", make))

    def publish(
        self,
        out: Path,
        arguments: dict[str, Any],
        calibration: Calibration,
        converted: tuple[int, ...],
        points: OperatingPoints,
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
        for name, _ in _parameters(config):
            prefix, _, rest = name.partition(".mlp.")
            index = int(prefix.rpartition(".")[2]) if rest else -1
            if rest and config.layers[index] is not None:
                yield name, self.workspace.layer_reader(index).get(rest)
            else:
                yield name, self.dense.reader.get(name)

    def report(
        self, model: str, arguments: dict[str, Any], converted: tuple[int, ...], points: OperatingPoints
    ) -> dict[str, Any]:
        calibration = self.workspace.record("calibration")
        sensitivity = self.workspace.record("sensitivity")
        layers: list[dict[str, Any]] = []
        for index in self.candidates:
            record = self.record(index)
            damage = sensitivity["perplexity"][str(index)]
            layers.append({"layer": index, "converted": index in converted, "converted_alone_perplexity": damage, **record})
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
                "training_seconds": sum(layer["seconds"] for layer in layers),
            },
            "num_hidden_layers": self.dense.config.num_hidden_layers,
            "holdout_dense_perplexity": sensitivity["dense_perplexity"],
            "layers": layers,
            **policy_entries(points),
        }

    @property
    def _depth(self) -> range:
        return range(self.dense.config.num_hidden_layers)


def load_experts(reader: TensorReader, prefix: str, layer: MoeLayerConfig, model: StreamedModel) -> ExpertLayer:
    """One expert layer on the model's device and in its dtype."""
    with torch.device("meta"):
        experts = ExpertLayer(model.config.hidden_size, layer)
    reader.load(experts, prefix, model.dtype, model.device)
    return experts


def recipe_taus(policies: PolicyRecipe) -> tuple[float, ...]:
    """The taus that a profile must have besides its own grid."""
    return (policies.quality, policies.balanced, policies.fast)


def _parameters(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    with torch.device("meta"):
        model = MoeTransformer(config)
    yield from model.named_parameters()
