"""Method elastic: our own. One checkpoint serves every budget. At the top it is the dense model exactly.

Each FFN's neurons are ordered by how much the layer needs them (`ladimo.convert.ffn.neuron_ordering`) and cut into experts in
that order. This is an exact partition: all experts together are the dense FFN. A budget keeps the first n experts of each
layer. The solver (`ladimo.convert.policies.knapsack`) chooses n per layer from measured damage. The budget then runs its own
copies of these experts, called substitutes: down_proj is solved again to make up for what is left out, and the copies are
distilled end to end on the dense model's logits and hidden states (`ladimo.convert.distill.end_to_end`). A model too large for
that is distilled layer by layer (`ladimo.convert.distill.streamed`). A policy is one static mask per layer. It needs no router,
and the weights that it leaves out are read at no batch size.

A small budget may also use routed substitutes: the FFN cut into E experts, of which a sigmoid router chooses k per token. They
are regressed on the FFN layer by layer and then distilled end to end like the others. They hold more parameters for the same
active ones, and are kept only where they clearly pay.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ladimo.convert.distill.layerwise import CurvePoint, distill_layer
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.ffn.neuron_ordering import expert_neurons, order_neurons
from ladimo.convert.ffn.split import check_experts, contiguous_partition, split_ffn
from ladimo.convert.recipe import ElasticRecipe, Recipe
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule

MIN_STEPS, MAX_STEPS = 40, 320  # of the end-to-end stage where the recipe names no number
CPU_WORK = 8e11  # parameters x tokens x budgets: about a minute on two cores
ROUTED_MARGIN = 0.1  # routed experts save less in larger batches, so they must be better by this share of the divergence

Weights = dict[str, Tensor]  # of a set of substitutes: gate_up_proj [n, 2F, D], down_proj [n, D, F]; routed: also gate [n, D]


class Elastic:
    def resolve(self, recipe: Recipe, config: ModelConfig, device: torch.device) -> Recipe:
        """With the budgets that follow from `target_active` and the steps that follow from the work, where the recipe names
        none."""
        elastic, target = recipe.elastic, recipe.target_active
        if not elastic.budgets:
            budgets = [(1 + target) / 2, target, max(target - 0.75 * (1 - target), target / 2)]
            elastic = dataclasses.replace(elastic, budgets=[round(budget, 4) for budget in budgets])
        if elastic.steps < 0:
            elastic = dataclasses.replace(elastic, steps=default_steps(elastic, config, device))
        return dataclasses.replace(recipe, elastic=elastic)

    def split(self, mlp: GatedMLP, data: LayerData, recipe: Recipe, generator: torch.Generator) -> ExpertLayer:
        widths = order_neurons(mlp, data, recipe.split.experts, recipe.elastic.ridge)
        return with_substitutes(mlp, widths.order, recipe.split.experts, [])

    def fit(self, layer: ExpertLayer, data: LayerData, recipe: Recipe, generator: torch.Generator) -> list[CurvePoint]:
        """Nothing: the partition stays exact. What is trained are the substitutes, of all layers at once, for each budget."""
        return []

    def describe(self, recipe: Recipe) -> str:
        elastic = recipe.elastic
        budgets = ", ".join(f"{budget:.0%}" for budget in elastic.budgets)
        trained = (
            f"are then distilled end to end on the dense model's logits and, with weight {elastic.hidden:g}, on its hidden "
            f"states: Muon, {elastic.steps} steps of {elastic.batch_tokens} tokens, learning rate {elastic.lr:g}; a budget "
            f"that this does not help on the holdout stays as it was solved. Models of more than {elastic.max_parameters:,} "
            f"parameters are distilled layer by layer instead, each on what those before it make of the text, with AdamW"
            if elastic.steps
            else "are not trained further"
        )
        routed = (
            f"Budgets of at most {elastic.routed:.0%} also try a mixture with routed layers ({recipe.split.experts} experts, a "
            f"sigmoid router, the chosen scores divided by their sum), trained layer by layer for {elastic.routed_steps} steps "
            f"and then like the others; it is kept beside the static one where its divergence on the holdout is at least "
            f"{ROUTED_MARGIN:.0%} lower."
            if elastic.routed and elastic.steps
            else "Policies are static masks without a router."
        )
        return (
            f"Elastic, LaDiMo's own method. Each FFN is cut into {recipe.split.experts} experts in the order in which it can "
            f"spare its neurons (optimal brain surgeon on second moments), so that all experts are the dense FFN exactly. For "
            f"each budget ({budgets} of the active parameters) a solver chooses how many experts each layer keeps, from damage "
            f"measured layer by layer; the kept neurons' down_proj is solved again in closed form for what was left out, and "
            f"these substitutes {trained}. {routed}"
        )


def default_steps(elastic: ElasticRecipe, config: ModelConfig, device: torch.device) -> int:
    """MAX_STEPS, on a CPU as many as CPU_WORK allows but at least MIN_STEPS. By the model's shape and never by the clock, so
    that a conversion that resumes goes on with the same number."""
    if device.type != "cpu":
        return MAX_STEPS
    parameters = config.dense_parameters + config.vocab_size * config.hidden_size
    steps = int(CPU_WORK / (parameters * elastic.batch_tokens * len(elastic.budgets)))
    return max(MIN_STEPS, min(MAX_STEPS, steps))


def with_substitutes(
    mlp: GatedMLP, order: Tensor, num_experts: int, fixed: Sequence[Weights], routed: Sequence[Weights] = ()
) -> ExpertLayer:
    """The exact partition of an FFN in this order [N], after it sets of fixed substitutes, then routed ones. In fp32 on the
    FFN's device; without routed ones it has no router, with them one that scores these alone."""
    partition = expert_neurons(order, num_experts)
    whole = MoeLayerConfig(num_experts, num_experts, partition.shape[1], expert_weight="one", router="none")
    exact = split_ffn(mlp, partition, whole, {})
    sets = [*fixed, *routed]
    if not sets:
        return exact
    count, scored = (sum(len(weights["down_proj"]) for weights in some) for some in (sets, routed))
    config = dataclasses.replace(whole, num_experts=num_experts + count, substitutes=count)
    if routed:
        config = dataclasses.replace(
            config,
            router="linear",
            score_function="sigmoid",
            expert_weight="score",
            fixed_experts=config.num_experts - scored,
        )
    with torch.device("meta"):
        layer = ExpertLayer(mlp.gate_proj.in_features, config)
    device = mlp.gate_proj.weight.device
    for name in ("gate_up_proj", "down_proj"):
        own = getattr(exact.experts, name).detach()
        stacked = torch.cat([own, *(weights[name].to(device).float() for weights in sets)])
        layer.experts.register_parameter(name, nn.Parameter(stacked))
    if routed:
        gate = torch.cat([weights["gate"].to(device).float() for weights in routed])
        layer.gate.load_state_dict({"weight": gate}, assign=True)
    return layer.requires_grad_(False)


def solved_substitute(mlp: GatedMLP, order: Tensor, num_experts: int, count: int, repaired: Tensor) -> Weights:
    """The first `count` experts with down_proj [D, K] solved again, in fp32 on the host."""
    partition = expert_neurons(order, num_experts)[:count]
    layer = MoeLayerConfig(count, count, partition.shape[1], expert_weight="one", router="none")
    part = split_ffn(mlp, partition, layer, {}).experts
    columns = torch.zeros(repaired.shape[0], partition.numel())
    columns[:, : repaired.shape[1]] = repaired  # only the last expert of all is padded, and it has no repair
    down = columns.view(len(columns), count, -1).transpose(0, 1)
    return {"gate_up_proj": part.gate_up_proj.detach().cpu(), "down_proj": down.contiguous()}


def routed_counts(num_experts: int) -> tuple[int, ...]:
    """Experts per token that routed substitutes are trained for. With one alone, whose score is divided by itself, the router
    would learn nothing; above half of the experts fixed ones are as good."""
    return tuple(range(2, num_experts // 2 + 1))


def routed_layer(mlp: GatedMLP, num_experts: int, count: int) -> ExpertLayer:
    """An FFN cut into routed experts of which `count` run per token, in fp32 on its device; the router is empty."""
    partition = contiguous_partition(mlp.gate_proj.out_features, num_experts)
    layer = MoeLayerConfig(num_experts, count, partition.shape[1], score_function="sigmoid")
    return split_ffn(mlp, partition, layer, {"weight": torch.zeros(num_experts, mlp.gate_proj.in_features)})


def routed_substitute(mlp: GatedMLP, data: LayerData, recipe: Recipe, generator: torch.Generator) -> Weights:
    """Routed experts regressed on the FFN's outputs, every step with another number of experts per token: a start for all
    budgets. In fp32 on the host. Raises ValueError when there are more experts than neurons or the training diverges."""
    check_experts(recipe.split.experts, mlp)
    counts = routed_counts(recipe.split.experts)
    layer = routed_layer(mlp, recipe.split.experts, counts[0])
    gate = torch.randn(recipe.split.experts, mlp.gate_proj.in_features, generator=generator) * recipe.split.gate_std
    layer.gate.load_state_dict({"weight": gate})
    train = dataclasses.replace(recipe.train, steps=recipe.elastic.routed_steps)
    distill_layer(layer, data, train, generator, [LayerRule(count) for count in counts])
    return weights_of(layer)


def weights_of(layer: ExpertLayer) -> Weights:
    """Routed experts on the host."""
    weights = {**layer.experts.state_dict(), "gate": layer.gate.state_dict()["weight"]}
    return {name: tensor.detach().cpu() for name, tensor in weights.items()}
