"""Elastic: our method. One checkpoint for every budget, exact at the top, each smaller budget solved and trained for.

Each FFN's neurons are put in the order in which it can spare them (`ladimo.convert.nested`) and cut into experts in that order:
an exact partition, so that all experts are the dense FFN. A budget keeps the first n experts of each layer, n chosen per layer
by measured damage (`ladimo.convert.solver`), and runs stand-ins for them, "substitutes": the same neurons with down_proj solved
again for what was left out, then distilled end to end on the teacher's logits (`ladimo.convert.polish`). A policy is one static
mask per layer: no router, and the weights it leaves out are not read at any batch size.
"""

import dataclasses

import torch
from torch import Tensor

from ladimo.convert.distill import CurvePoint, LayerData
from ladimo.convert.nested import expert_neurons, nested_widths
from ladimo.convert.recipe import Recipe
from ladimo.convert.split import split_ffn
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer


class Elastic:
    def resolve(self, recipe: Recipe, config: ModelConfig) -> Recipe:
        """With the budgets that follow from `target_active` where the recipe names none."""
        if recipe.elastic.budgets:
            return recipe
        target = recipe.target_active
        budgets = [(1 + target) / 2, target, max(target - 0.75 * (1 - target), target / 2)]
        return dataclasses.replace(
            recipe, elastic=dataclasses.replace(recipe.elastic, budgets=[round(budget, 4) for budget in budgets])
        )

    def split(self, mlp: GatedMLP, data: LayerData, recipe: Recipe, generator: torch.Generator) -> ExpertLayer:
        widths = nested_widths(mlp, data, recipe.split.experts, recipe.elastic.ridge)
        return with_substitutes(mlp, widths.order, recipe.split.experts, [])

    def fit(self, layer: ExpertLayer, data: LayerData, recipe: Recipe, generator: torch.Generator) -> list[CurvePoint]:
        """Nothing: the partition stays exact. What is trained are the substitutes, of all layers at once, for each budget."""
        return []

    def describe(self, recipe: Recipe) -> str:
        elastic = recipe.elastic
        budgets = ", ".join(f"{budget:.0%}" for budget in elastic.budgets)
        trained = (
            f"are then distilled end to end on the dense model's logits: AdamW, {elastic.steps} steps of "
            f"{elastic.batch_tokens} tokens, learning rate {elastic.lr:g}; a budget that this does not help on the holdout "
            f"stays as it was solved"
            if elastic.steps
            else "are not trained further"
        )
        return (
            f"Elastic, LaDiMo's own method. Each FFN is cut into {recipe.split.experts} experts in the order in which it can "
            f"spare its neurons (optimal brain surgeon on second moments), so that all experts are the dense FFN exactly. For "
            f"each budget ({budgets} of the active parameters) a solver chooses how many experts each layer keeps, from damage "
            f"measured layer by layer; the kept neurons' down_proj is solved again in closed form for what was left out, and "
            f"these substitutes {trained}. Policies are static masks without a router."
        )


def with_substitutes(mlp: GatedMLP, order: Tensor, num_experts: int, substitutes: list[tuple[Tensor, Tensor]]) -> ExpertLayer:
    """The exact partition of an FFN in this order [N], and after it the substitutes: each a pair gate_up_proj [n, 2F, D] and
    down_proj [n, D, F]. In fp32 on the FFN's device; it has no router."""
    partition = expert_neurons(order, num_experts)
    whole = MoeLayerConfig(num_experts, num_experts, partition.shape[1], expert_weight="one", router="none")
    exact = split_ffn(mlp, partition, whole, {})
    if not substitutes:
        return exact
    count = sum(len(gate_up) for gate_up, _ in substitutes)
    with torch.device("meta"):
        layer = ExpertLayer(
            mlp.gate_proj.in_features, dataclasses.replace(whole, num_experts=num_experts + count, substitutes=count)
        )
    device = mlp.gate_proj.weight.device
    gate_ups, downs = zip(*substitutes, strict=True)
    weights = {
        "gate_up_proj": torch.cat([exact.experts.gate_up_proj.detach(), *(part.to(device).float() for part in gate_ups)]),
        "down_proj": torch.cat([exact.experts.down_proj.detach(), *(part.to(device).float() for part in downs)]),
    }
    layer.experts.load_state_dict(weights, assign=True)
    return layer.requires_grad_(False)


def solved_substitute(mlp: GatedMLP, order: Tensor, num_experts: int, count: int, repaired: Tensor) -> tuple[Tensor, Tensor]:
    """The first `count` experts with down_proj [D, K] solved again: gate_up_proj [n, 2F, D] and down_proj [n, D, F] in fp32 on
    the host."""
    partition = expert_neurons(order, num_experts)[:count]
    layer = MoeLayerConfig(count, count, partition.shape[1], expert_weight="one", router="none")
    part = split_ffn(mlp, partition, layer, {}).experts
    columns = torch.zeros(repaired.shape[0], partition.numel())
    columns[:, : repaired.shape[1]] = repaired  # only the last expert of all is padded, and it has no repair
    down = columns.view(len(columns), count, -1).transpose(0, 1)
    return part.gate_up_proj.detach().cpu(), down.contiguous()
