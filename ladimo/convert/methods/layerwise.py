"""The common part of methods that work layer by layer: they split an FFN into experts and train them, one layer after another.

Then the damage of each layer is measured, with only this layer converted. It decides which layers are converted. Policies are
LaDiMo's training-free ones, from a profile of each layer's router. A method only defines how to `split` an FFN and how to `fit`
the experts.
"""

import logging
import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from ladimo.convert.data.calibration import Calibration
from ladimo.convert.distill.layerwise import CurvePoint
from ladimo.convert.evaluation.measure import measure
from ladimo.convert.evaluation.variants import Rules
from ladimo.convert.ffn.expert_layer import full_rule, layer_error
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.jobs.layer_jobs import work_on_layers
from ladimo.convert.methods.base import Converted, Method
from ladimo.convert.methods.report_figures import depth_curve, initialisation_curves
from ladimo.convert.policies.candidates import Candidates, ConvertedModel, routed_candidates
from ladimo.convert.policies.choose import choose_layers, full_cost
from ladimo.convert.policies.routing_profile import LayerProfile, profile_layer
from ladimo.convert.recipe import Recipe
from ladimo.convert.run import Run
from ladimo.convert.streamed_model import load_experts
from ladimo.model.layers import Ffn
from ladimo.model.moe import ExpertLayer
from ladimo.policy import RoutingPolicy

INITIALISATION_STEPS = 100  # steps of the two trainings that compare the split weights with random ones

logger = logging.getLogger(__name__)


class LayerwiseMethod(Method):
    """trains_experts: whether `fit` also changes the weights of experts, and not only those of the router."""

    trains_experts: ClassVar[bool] = True
    parallel = True

    @abstractmethod
    def split(self, mlp: Ffn, data: LayerData, recipe: Recipe, generator: torch.Generator) -> ExpertLayer:
        """Split an FFN into an expert layer, in fp32 on the FFN's device."""

    @abstractmethod
    def fit(self, layer: ExpertLayer, data: LayerData, recipe: Recipe, generator: torch.Generator) -> list[CurvePoint]:
        """Train the layer in place. Return its loss curve, which is empty for a method without training."""

    def convert(self, run: Run, calibration: Calibration) -> Converted:
        work_on_layers(run, calibration, self.train_layer)
        scan = self.scan_layers(run, calibration)
        converted = tuple(scan["converted"])
        figures = run.workspace.stage("experiments", lambda: self.report_figures(run, calibration, scan["perplexity"]))
        records = {index: run.workspace.finished_record(index) for index in run.candidates}
        profiles = {index: LayerProfile.from_dict(records[index]["profile"]) for index in converted}
        return Converted(
            layers={index: run.workspace.layer_config(index) for index in converted},
            entries=[
                {
                    "layer": index,
                    "converted": index in converted,
                    "converted_alone_perplexity": scan["perplexity"][str(index)],
                    **record,
                }
                for index, record in records.items()
            ],
            candidates=lambda model: routed_candidates(model, profiles, calibration.holdout, run.recipe),
            report={"holdout_dense_perplexity": scan["dense_perplexity"], **figures},
        )

    def train_layer(self, run: Run, index: int, mlp: Ffn, data: LayerData) -> None:
        """Make one layer, and save it in the workspace with its curve and its profile."""
        started, generator = time.monotonic(), run.generator(index)
        layer = self.split(mlp, data, run.recipe, generator)
        initial = layer_error(layer, data.holdout_inputs, data.holdout_targets)
        curve = self.fit(layer, data, run.recipe, generator)
        run.workspace.save_layer(index, layer, run.dense.stored_dtype)
        stored = load_experts(run.workspace.layer_reader(index), layer.config, run.dense)
        profile = profile_layer(stored, data.holdout_inputs, data.holdout_targets, run.recipe.policies.taus)
        record = {
            "curve": [asdict(point) for point in curve],
            "initial_error": initial,
            "error": profile.by_top_k[-1].error,
            "profile": profile.to_dict(),
            "seconds": time.monotonic() - started,
        }
        run.workspace.finish_layer(index, layer.config, record)
        logger.info(
            "layer %d: holdout error %.3f -> %.3f of the FFN's variance, best expert's weight %.2f, %.0f s",
            index, initial, record["error"], profile.mean_best_weight, record["seconds"],
        )  # fmt: skip

    def scan_layers(self, run: Run, calibration: Calibration) -> dict[str, Any]:
        """The stage that measures the model with each layer converted alone, and chooses the layers to convert. Under `auto`,
        the least damaging layers are chosen."""

        def make() -> dict[str, Any]:
            depth = run.dense.config.num_hidden_layers
            none: Rules = (None,) * depth
            swapped: dict[int, Rules] = {}
            for index in run.candidates:
                rule = full_rule(run.experts(index))
                swapped[index] = tuple(rule if layer == index else None for layer in range(depth))
            measured = measure(run.dense, run.experts, calibration.holdout, [none, *swapped.values()])
            damage = {index: measured[rules].perplexity for index, rules in swapped.items()}
            configs = {index: run.workspace.layer_config(index) for index in run.candidates}
            chosen = run.candidates
            if run.recipe.layers == "auto":
                savings = {index: 1.0 - full_cost(run.config({index: layer})) for index, layer in configs.items()}
                chosen = choose_layers(damage, savings, run.recipe.target_active)
            return {
                "dense_perplexity": measured[none].perplexity,
                "perplexity": {str(index): value for index, value in damage.items()},
                "converted": list(chosen),
                "active_parameters_ratio": full_cost(run.config({index: configs[index] for index in chosen})),
            }

        record = run.workspace.stage("sensitivity", make)
        for index, value in record["perplexity"].items():
            ratio = value / record["dense_perplexity"]
            logger.info("layer %s alone converted: perplexity %.3f (dense x %.3f)", index, value, ratio)
        cost, target = record["active_parameters_ratio"], run.recipe.target_active
        logger.info("converting layers %s: %.1f%% active parameters", record["converted"], 100 * cost)
        if run.recipe.layers == "auto" and cost > target:
            logger.warning("all layers are converted, and the target of %.1f%% is not reached", 100 * target)
        return record

    def report_figures(self, run: Run, calibration: Calibration, damage: Mapping[str, float]) -> dict[str, Any]:
        """Figures for the report only: the model with more and more layers converted and, if experts are trained, a training of
        the middle layer from split and from random weights."""
        order = sorted(run.candidates, key=lambda index: damage[str(index)])
        config = run.config({index: run.workspace.layer_config(index) for index in run.candidates})
        model = ConvertedModel(run.dense, run.experts, config)
        found: dict[str, Any] = {"depth": depth_curve(model, order, calibration.holdout)}
        middle = run.candidates[len(run.candidates) // 2]
        if self.trains_experts and run.workspace.finished_record(middle)["curve"]:
            blocks = torch.cat((calibration.fit, calibration.holdout))
            steps = min(INITIALISATION_STEPS, run.recipe.train.steps)
            for _, mlp, inputs, targets in run.dense.ffn_data(blocks, [middle]):
                data = LayerData.cut(inputs, targets, calibration.fit.numel())
                found["initialisation"] = initialisation_curves(self, mlp, data, run.recipe, middle, steps)
        return found

    def reprofile(
        self, recipe: Recipe, model: ConvertedModel, stored: Mapping[str, RoutingPolicy], blocks: Tensor, report: dict[str, Any]
    ) -> Candidates:
        profiles: dict[int, LayerProfile] = {}
        for index, _, inputs, targets in model.dense.ffn_data(blocks, model.config.moe_layer_indices):
            profiles[index] = profile_layer(model.experts(index), inputs, targets, recipe.policies.taus)
            logger.info("layer %d: best expert's weight %.2f", index, profiles[index].mean_best_weight)
        for layer in report["layers"]:
            if layer["layer"] in profiles:
                layer["profile"] = profiles[layer["layer"]].to_dict()
        return routed_candidates(model, profiles, blocks, recipe)
