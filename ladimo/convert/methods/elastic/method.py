"""Method elastic: our own. One checkpoint serves every budget. At the top it is the dense model exactly.

1. Each FFN's neurons are ordered by how much the layer needs them (`ladimo.convert.ffn.neuron_ordering`) and cut into experts
   in that order. This is an exact partition: all experts together are the dense FFN.
2. A budget keeps the first n experts of each layer. The solver (`ladimo.convert.policies.knapsack`) chooses n per layer by
   what each width of each layer damages alone (`ladimo.convert.policies.sensitivity`).
3. The budget runs its own copies of the experts it keeps, called substitutes. Their down_proj is solved again to make up for
   what is left out. Then they are distilled end to end on the dense model's logits and hidden states, or layer by layer in a
   model too large for that.

A policy is one static mask per layer. It needs no router, and the weights that it leaves out are read at no batch size.

A small budget may also use routed substitutes: the FFN cut into E experts, of which a sigmoid router chooses k per token.
They are regressed on the FFN layer by layer and then distilled end to end like the others. They hold more parameters for the
same active ones, and are kept only where they clearly pay.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ladimo.convert.data.calibration import Calibration
from ladimo.convert.layer_jobs import work_on_layers
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
    options = ElasticRecipe

    def resolve(self, recipe: Recipe, config: ModelConfig, device: torch.device) -> Recipe:
        return resolved(recipe, config, device)

    def describe(self, recipe: Recipe) -> str:
        elastic = recipe.section(ElasticRecipe)
        budgets = ", ".join(f"{budget:.0%}" for budget in elastic.budgets)
        trained = (
            f"are then distilled end to end on the dense model's logits and, with weight {elastic.hidden:g}, on its hidden "
            f"states: Muon, {elastic.steps} steps of {elastic.batch_tokens} tokens, learning rate {elastic.lr:g}. A budget "
            f"that this does not help on the holdout stays as it was solved. Models of more than {elastic.max_parameters:,} "
            f"parameters are distilled layer by layer instead, with AdamW, each layer on what the layers before it give"
            if elastic.steps
            else "are not trained further"
        )
        routed = (
            f"Budgets of at most {elastic.routed:.0%} also try a mixture with routed layers ({recipe.split.experts} experts, a "
            f"sigmoid router, the chosen scores divided by their sum), trained layer by layer for {elastic.routed_steps} steps "
            f"and then like the others. It is kept beside the static one where its divergence on the holdout is at least "
            f"{elastic.routed_margin:.0%} lower."
            if elastic.routed and elastic.steps
            else "Policies are static masks without a router."
        )
        return (
            f"Elastic, LaDiMo's own method. Each FFN is cut into {recipe.split.experts} experts in the order in which it can "
            f"spare its neurons (optimal brain surgeon on second moments), so that all experts are the dense FFN exactly. For "
            f"each budget ({budgets} of the active parameters) a solver chooses how many experts each layer keeps, from the "
            f"damage that each width of each layer does alone. The kept neurons' down_proj is solved again in closed form for "
            f"what was left out, and these substitutes {trained}. {routed}"
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
        """Plans and substitutes stay; what is between them is chosen anew."""
        names = [*NAMED, *(budget["policy"] for budget in report["elastic"]["budgets"])]
        if missing := [name for name in names if name not in stored]:
            raise ValueError(f"policy {missing[0]!r} is not there; it was made with the checkpoint and is needed")
        return budget_candidates(model, {name: stored[name].layers for name in names}, blocks, recipe)

    def view(self, report: Report) -> MethodView:
        return elastic_view(report)


def find_damage(run: Run, layers: SolvedLayers, calibration: Calibration) -> dict[str, Any]:
    """KL divergence from the dense model when one layer alone is narrowed or routed: a stage. "damage": by layer and number
    of fixed experts. "routed_damage": by layer and number of routed ones. "measured": the numbers of fixed experts whose
    damage was measured rather than estimated, by layer."""

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
    """Expert layers that hold all widths of a layer side by side, and its routed experts where budgets may route. Untrained.

    fixed, routed: the rule for every number of experts.
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
    """Fixed widths of every layer for every budget, and mixtures with routed layers for the contested ones: a stage."""
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
