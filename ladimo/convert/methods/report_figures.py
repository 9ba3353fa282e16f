"""Figures for the report only, from small trainings and measurements beside the conversion.

Each is the value of a key of report.json: "initialisation" or "depth".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ladimo.convert.distill.layerwise import CurvePoint
from ladimo.convert.evaluation.measure import measure
from ladimo.convert.evaluation.variants import PASS_BYTES, Rules
from ladimo.convert.ffn.expert_layer import layer_error
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.policies.candidates import ConvertedModel
from ladimo.convert.recipe import Recipe
from ladimo.convert.run import layer_seed
from ladimo.model.layers import Ffn
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule


class Trainable(Protocol):
    """The part of a layer-wise method that is used here."""

    def split(self, mlp: Ffn, data: LayerData, recipe: Recipe, generator: torch.Generator) -> ExpertLayer: ...

    def fit(self, layer: ExpertLayer, data: LayerData, recipe: Recipe, generator: torch.Generator) -> list[CurvePoint]: ...


def initialisation_curves(
    method: Trainable, mlp: Ffn, data: LayerData, recipe: Recipe, layer: int, steps: int = 100
) -> dict[str, Any]:
    """Two short trainings of one layer, from the split weights and from random ones (LaDiMo's Fig 2). All else is the same.

    Random weights are normally distributed, with the standard deviation of the split weights, tensor by tensor. So only the
    knowledge of the source is lost. Padded neurons stay zero. Returns {"layer", "steps", "curves": {"split", "random"}}. A
    curve is a list of {"step", "holdout"} from step 0 on. holdout is the error, divided by the variance of the FFN's outputs.
    """
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=steps))
    curves = {}
    for name in ("split", "random"):
        generator = torch.Generator().manual_seed(layer_seed(recipe, layer))
        expert_layer = method.split(mlp, data, recipe, generator)
        if name == "random":
            forget(expert_layer, generator)
        points = [{"step": 0, "holdout": layer_error(expert_layer, data.holdout_inputs, data.holdout_targets)}]
        trained = method.fit(expert_layer, data, recipe, generator)
        curves[name] = points + [{"step": point.step, "holdout": point.holdout} for point in trained]
    return {"layer": layer, "steps": steps, "curves": curves}


@torch.no_grad()
def forget(layer: ExpertLayer, generator: torch.Generator) -> None:
    """Replace the experts' weights by random ones with the same standard deviation. Zeros, which are padding, stay."""
    for weight in layer.experts.parameters():
        used = weight != 0
        drawn = torch.randn(weight.shape, generator=generator).to(weight) * weight[used].std()
        weight.copy_(drawn * used)


def depth_curve(
    model: ConvertedModel,
    order: Sequence[int],
    blocks: torch.Tensor,
    rules: Mapping[int, LayerRule] | None = None,
    points: int = 9,
    pass_bytes: int = PASS_BYTES,
) -> list[dict[str, Any]]:
    """The accuracy and the cost of the model with the first n layers of `order` converted, the least damaging first (LaDiMo's
    Fig 4). Up to `points` values of n, from none to all, are measured in one pass over the layers.

    model: has every layer of `order` converted. rules: by layer; None: those of `full`. blocks: tokens [B, S]. Only so many are
    used that the variants' hidden states take at most `pass_bytes`. Entries: {"converted", "layers", "perplexity",
    "perplexity_ratio", "next_token_agreement", "active_parameters_ratio"}.
    """
    config = model.config
    counts = sorted({round(len(order) * point / (points - 1)) for point in range(points)})
    variants: dict[int, Rules] = {}
    for count in counts:
        chosen = set(order[:count])
        variants[count] = tuple(
            None if layer is None or index not in chosen else rules[index] if rules else LayerRule.full(layer)
            for index, layer in enumerate(config.layers)
        )
    bytes_per_block = len(variants) * blocks.shape[1] * config.hidden_size * model.dense.dtype.itemsize
    fitting = blocks[: max(1, pass_bytes // bytes_per_block)]
    measured = measure(model.dense, model.experts, fitting, variants.values(), variants[0])
    dense = measured[variants[0]].perplexity
    entries = []
    for count, variant in variants.items():
        layers = tuple(layer if rule else None for layer, rule in zip(config.layers, variant, strict=True))
        found = measured[variant]
        entries.append(
            {
                "converted": count,
                "layers": sorted(order[:count]),
                "perplexity": found.perplexity,
                "perplexity_ratio": found.perplexity / dense,
                "next_token_agreement": found.next_token_agreement,
                "active_parameters_ratio": dataclasses.replace(config, layers=layers).active_parameters_ratio(
                    found.experts_per_token
                ),
            }
        )
    return entries
