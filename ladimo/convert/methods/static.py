"""The baseline without routing: pruning to the same budget, with the same statistics and the same distillation.

Each layer keeps its most important neurons as one expert that always runs. If a routed method is not better than this at equal
cost, its routing is worth nothing.
"""

import dataclasses
from dataclasses import dataclass

import torch

from ladimo.convert.distill.layerwise import CurvePoint, distill_layer
from ladimo.convert.ffn.hidden_channels import neuron_statistics
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.ffn.least_squares import solve_down
from ladimo.convert.ffn.split import split_ffn
from ladimo.convert.methods.layerwise import LayerwiseMethod
from ladimo.convert.methods.registry import register
from ladimo.convert.recipe import Recipe, require
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.layers import Ffn
from ladimo.model.moe import ExpertLayer


@dataclass(frozen=True, slots=True)
class StaticRecipe:
    """kept: the share of each FFN's neurons that stay; 0: the share that follows from `target_active`. resolve: solve
    `down_proj` again for the neurons that stay. ridge: how strongly this solution is pulled to the original weights, in units
    of each channel's own power; 0: the best value on the holdout.
    """

    kept: float = 0.0
    resolve: bool = True
    ridge: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.kept <= 1, "static.kept", "must be between 0 and 1", self.kept)
        require(self.ridge >= 0, "static.ridge", "must be at least 0", self.ridge)


@register
class Static(LayerwiseMethod):
    name = "static"
    ffn_kinds = ("swiglu", "gelu")
    options = StaticRecipe

    def resolve(self, recipe: Recipe, config: ModelConfig, device: torch.device) -> Recipe:
        """The recipe with the share of neurons that follows from `target_active`. It is the same in every candidate layer.

        Raises ValueError if the target cannot be reached.
        """
        if recipe.section(StaticRecipe).kept:
            return recipe
        width = static_width(config, recipe)
        kept = width / config.intermediate_size
        return recipe.with_section(dataclasses.replace(recipe.section(StaticRecipe), kept=kept))

    def split(self, mlp: Ffn, data: LayerData, recipe: Recipe, generator: torch.Generator) -> ExpertLayer:
        """The recipe must have static.kept (see `resolve`)."""
        assert recipe.section(StaticRecipe).kept > 0
        width = max(1, round(recipe.section(StaticRecipe).kept * mlp.up_proj.out_features))
        kept = neuron_statistics(mlp, data.fit_inputs).importance.topk(width).indices.sort().values.cpu()
        config = MoeLayerConfig(1, 1, width, expert_weight="one", router="none", ffn_kind=mlp.kind)
        layer = split_ffn(mlp, kept.unsqueeze(0), config, {})
        if recipe.section(StaticRecipe).resolve:
            with torch.no_grad():
                layer.experts.down_proj[0] = solve_down(mlp, kept, data, recipe.section(StaticRecipe).ridge)[0]
        return layer

    def fit(self, layer: ExpertLayer, data: LayerData, recipe: Recipe, generator: torch.Generator) -> list[CurvePoint]:
        return distill_layer(layer, data, recipe.train, generator)

    def describe(self, recipe: Recipe) -> str:
        static, train = recipe.section(StaticRecipe), recipe.train
        ridge = f"ridge {static.ridge:g}" if static.ridge else "ridge chosen on the holdout"
        solved = f" down_proj is solved again for them by least squares ({ridge})." if static.resolve else ""
        tuned = (
            f" All weights are then distilled layer by layer: {train.steps} steps of {train.batch_tokens} tokens, learning "
            f"rate {train.expert_lr:g}."
            if train.steps
            else " Nothing is trained."
        )
        return (
            f"Static pruning, the control without routing. Each converted FFN keeps the {static.kept:.1%} of its neurons whose "
            f"output has the largest mean square, E[h^2] * |down column|^2.{solved}{tuned}"
        )


def static_width(config: ModelConfig, recipe: Recipe) -> int:
    """The largest number of neurons per candidate layer, equal in all, with which the model stays within `target_active`.

    Raises ValueError if even one neuron is too many.
    """

    def cost(width: int) -> float:
        layer = MoeLayerConfig(1, 1, width, expert_weight="one", router="none", ffn_kind=config.ffn_kind)
        candidates = recipe.candidate_layers(config.num_hidden_layers)
        layers = tuple(layer if index in candidates else None for index in range(config.num_hidden_layers))
        return dataclasses.replace(config, layers=layers).active_parameters_ratio((1.0,) * config.num_hidden_layers)

    whole, empty = cost(config.intermediate_size), cost(1)
    if empty > recipe.target_active:
        raise ValueError(f"target_active: is {recipe.target_active:g}, pruning these layers cannot go below {empty:.3f}")
    per_neuron = (whole - empty) / max(1, config.intermediate_size - 1)
    width = config.intermediate_size - round((whole - recipe.target_active) / per_neuron)
    while cost(width) > recipe.target_active + 1e-12:
        width -= 1
    return width
