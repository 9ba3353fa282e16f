"""Method elastic, our own: one checkpoint for every budget. Policy `full` is exactly the dense model.

1. The neurons of each FFN are ordered by importance (`ladimo.convert.ffn.neuron_ordering`) and divided into experts in this
   order. This is an exact partition: all experts together are the dense FFN.
2. A budget keeps the first n experts of each layer. The solver (`ladimo.convert.policies.knapsack`) chooses n for each layer,
   from the damage of each width of each layer alone (`ladimo.convert.policies.sensitivity`).
3. Each budget has its own copies of the experts that it keeps, called substitutes. Their down_proj is solved again to
   compensate for the experts that are left out. Then they are distilled end to end on the dense model's logits and hidden
   states. If the model is too large for that, they are distilled layer by layer.

A policy is a static mask for each layer. It needs no router. The experts outside the mask are not read at any batch size.

A small budget may also use routed substitutes. The FFN is divided into E experts, and a sigmoid router chooses k of them per
token. They are trained by regression on the FFN layer by layer, and then distilled end to end like the others. They need more
parameters in memory for the same number of active ones. So they are kept only if they are clearly better.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ladimo.convert.data.calibration import Calibration
from ladimo.convert.jobs.layer_jobs import work_on_layers
from ladimo.convert.methods.base import Converted, Method
from ladimo.convert.methods.elastic.layers import SolvedLayers, contested_budgets, solve_layer
from ladimo.convert.methods.elastic.plans import (
    Plan,
    Planner,
    converted_layers,
    plan_names,
    plan_policies,
    routed_rule,
    static_rule,
)
from ladimo.convert.methods.elastic.recipe import ElasticRecipe, resolved
from ladimo.convert.methods.elastic.report import elastic_view
from ladimo.convert.methods.elastic.substitutes import routed_counts
from ladimo.convert.methods.elastic.training import finish_layers, scanned, train_plans
from ladimo.convert.methods.registry import register
from ladimo.convert.policies.candidates import Candidates, ConvertedModel, budget_candidates
from ladimo.convert.policies.choose import NAMED
from ladimo.convert.policies.sensitivity import rule_damages
from ladimo.convert.recipe import Recipe
from ladimo.convert.report.document import MethodView
from ladimo.convert.report.record import Report
from ladimo.convert.run import Run
from ladimo.model.config import ModelConfig
from ladimo.model.moe import ExpertLayer
from ladimo.policy import RoutingPolicy

logger = logging.getLogger(__name__)


@register
class Elastic(Method):
    name = "elastic"
    ffn_kinds = ("swiglu", "gelu")
    options = ElasticRecipe
    parallel = True

    def resolve(self, recipe: Recipe, config: ModelConfig, device: torch.device) -> Recipe:
        return resolved(recipe, config, device)

    def describe(self, recipe: Recipe) -> str:
        elastic = recipe.section(ElasticRecipe)
        budgets = ", ".join(f"{budget:.0%}" for budget in elastic.budgets)
        trained = (
            f"are then distilled end to end on the dense model's logits and, with weight {elastic.hidden:g}, on its hidden "
            f"states: Muon, {elastic.steps} steps of {elastic.batch_tokens} tokens, learning rate {elastic.lr:g}. If this does "
            f"not help a budget on the holdout, its solved weights stay. Models of more than {elastic.max_parameters:,} "
            f"parameters are distilled layer by layer instead, with AdamW, on the outputs of the student's earlier layers"
            if elastic.steps
            else "are not trained further"
        )
        routed = (
            f"Budgets of at most {elastic.routed:.0%} also try a mixture with routed layers ({recipe.split.experts} experts, a "
            f"sigmoid router, the chosen scores divided by their sum), trained layer by layer for {elastic.routed_steps} steps "
            f"and then like the others. It is kept beside the static policy if its divergence on the holdout is at least "
            f"{elastic.routed_margin:.0%} lower."
            if elastic.routed and elastic.steps
            else "Policies are static masks without a router."
        )
        return (
            f"Elastic, LaDiMo's own method. Each FFN is divided into {recipe.split.experts} experts, in the order of its "
            f"neurons' importance (optimal brain surgeon on second moments). All experts together are exactly the dense FFN. "
            f"For each budget ({budgets} of the active parameters) a solver chooses how many experts each layer keeps, from "
            f"the damage of each width of each layer alone. For the kept neurons, down_proj is solved again in closed form to "
            f"compensate for the others. These substitutes {trained}. {routed}"
        )

    def convert(self, run: Run, calibration: Calibration) -> Converted:
        elastic, num_experts = run.recipe.section(ElasticRecipe), run.recipe.split.experts
        work_on_layers(run, calibration, solve_layer)
        layers = SolvedLayers(run)
        damage = find_damage(run, layers, calibration)
        trained = train_plans(run, layers, make_plans(run, damage), calibration)
        plans = [one.plan for one in trained]
        converted = converted_layers(plans, run.candidates, num_experts)
        finish_layers(run, layers, trained, converted)
        names = plan_names(plans, elastic.budgets)
        policies = plan_policies(plans, names, converted, num_experts, run.dense.config.num_hidden_layers)
        configs = {index: run.workspace.layer_config(index) for index in converted}
        config = run.config(configs)
        stored = tuple(None if layer is None else layer.num_experts for layer in config.layers)
        budgets = [
            {
                "policy": name,
                "target": elastic.budgets[one.plan.budget],
                "widths": list(one.plan.widths),
                "routed": list(one.plan.routed),
                "curve": one.curve,
                "layer_errors": one.layer_errors,
            }
            for name, one in zip(names, trained, strict=True)
        ]
        return Converted(
            layers=configs,
            entries=[
                {
                    "layer": index,
                    "converted": index in converted,
                    "damage": damage["damage"][str(index)],
                    "damage_measured": damage["measured"][str(index)],
                    **run.workspace.finished_record(index),
                }
                for index in run.candidates
            ],
            candidates=lambda model: budget_candidates(model, policies, scanned(calibration.holdout, elastic), run.recipe),
            report={
                "elastic": {"budgets": budgets, "experts": num_experts, "stored_ratio": config.active_parameters_ratio(stored)}
            },
            seconds=run.workspace.record("substitutes")["seconds"],
        )

    def reprofile(
        self, recipe: Recipe, model: ConvertedModel, stored: Mapping[str, RoutingPolicy], blocks: Tensor, report: dict[str, Any]
    ) -> Candidates:
        """The policies of the plans stay. The mixtures between them are chosen again."""
        names = [*NAMED, *(budget["policy"] for budget in report["elastic"]["budgets"])]
        if missing := [name for name in names if name not in stored]:
            raise ValueError(f"policy {missing[0]!r} is missing; it was made with the checkpoint and is needed")
        return budget_candidates(model, {name: stored[name].layers for name in names}, blocks, recipe)

    def view(self, report: Report) -> MethodView:
        return elastic_view(report)


def find_damage(run: Run, layers: SolvedLayers, calibration: Calibration) -> dict[str, Any]:
    """The stage that finds the KL divergence from the dense model if one layer alone is narrowed or routed. "damage": by layer
    and number of fixed experts. "routed_damage": by layer and number of routed experts. "measured": for each layer, the numbers
    of fixed experts whose damage was measured, too."""

    def make() -> dict[str, Any]:
        blocks = scanned(calibration.holdout, run.recipe.section(ElasticRecipe))
        probe = Probe(run, layers)
        found = rule_damages(run.dense, probe, dict.fromkeys(run.candidates, probe.rules), blocks)
        record: dict[str, Any] = {"damage": {}, "routed_damage": {}, "measured": {}}
        for index, damages in found.items():
            record["damage"][str(index)] = {str(count): damages[rule].kl for count, rule in probe.fixed.items()}
            record["routed_damage"][str(index)] = {str(count): damages[rule].kl for count, rule in probe.routed.items()}
            record["measured"][str(index)] = [count for count, rule in probe.fixed.items() if damages[rule].measured]
        measured = sum(one.measured for damages in found.values() for one in damages.values())
        options = sum(len(damages) for damages in found.values())
        logger.info("damage of %d widths and routings: estimated, %d of them measured", options, measured)
        return record

    return run.workspace.stage("damage", make)


class Probe:
    """Makes expert layers with the untrained substitutes of all widths of a layer. If a budget may route, they also have its
    routed experts. fixed, routed: the rule for each number of experts.
    """

    def __init__(self, run: Run, layers: SolvedLayers) -> None:
        self._layers, self._dtype = layers, run.dense.dtype
        self._contested = bool(contested_budgets(run))
        experts = run.recipe.split.experts
        self.counts = range(1, experts)
        firsts = {count: experts + sum(range(1, count)) for count in self.counts}
        self.fixed = {count: static_rule(first, count) for count, first in firsts.items()}
        last = experts + sum(self.counts)
        self.routed = {count: routed_rule(last, count, experts) for count in routed_counts(experts) if self._contested}
        self.rules = [*self.fixed.values(), *self.routed.values()]

    def __call__(self, index: int) -> ExpertLayer:
        layer = self._layers[index]
        routed = [self._layers.routed(index)] if self._contested else []
        return layer.with_substitutes([layer.substitute(count) for count in self.counts], routed).to(self._dtype)


def make_plans(run: Run, damage: Mapping[str, Any]) -> list[Plan]:
    """The stage that makes the plans: fixed widths for every budget, and mixtures with routed layers for contested budgets."""
    elastic, experts = run.recipe.section(ElasticRecipe), run.recipe.split.experts
    planner = Planner(run.dense.config, run.candidates, experts, elastic.budgets, contested_budgets(run))
    fixed, routed = (
        {int(index): {int(count): kl for count, kl in layer.items()} for index, layer in damage[name].items()}
        for name in ("damage", "routed_damage")
    )

    def make() -> dict[str, Any]:
        plans = planner.uniform() if elastic.uniform else planner.plans(fixed, routed)
        return {"plans": [{"budget": plan.budget, "widths": plan.widths, "routed": plan.routed} for plan in plans]}

    plans = [Plan.from_dict(raw) for raw in run.workspace.stage("plans", make)["plans"]]
    for plan in plans:
        kind = f"layers {list(plan.routed)} routed" if plan.routed else "fixed"
        target = 100 * elastic.budgets[plan.budget]
        logger.info("budget %.0f%%: %s of %d experts per layer, %s", target, list(plan.widths), experts, kind)
    return plans
