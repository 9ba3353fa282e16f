"""The conversion methods, one file each, chosen by name from one registry.

A method is three steps, after `resolve` has put into the recipe what the model's shape and the device decide. `split` turns an
FFN into an expert layer, `fit` trains it in place and returns its loss curve (empty for a method without training), `describe`
says in a few sentences what was done and from which paper. Data, streaming, policies, evaluation and reports are the pipeline's
and the same for all.
"""

from typing import Protocol

import torch

from ladimo.convert.distill.layerwise import CurvePoint
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.methods import cmoe, ladimo, moefication, static
from ladimo.convert.methods.elastic.substitutes import Elastic
from ladimo.convert.recipe import Recipe
from ladimo.model.config import ModelConfig
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer


class Method(Protocol):
    def resolve(self, recipe: Recipe, config: ModelConfig, device: torch.device) -> Recipe: ...

    def split(self, mlp: GatedMLP, data: LayerData, recipe: Recipe, generator: torch.Generator) -> ExpertLayer: ...

    def fit(self, layer: ExpertLayer, data: LayerData, recipe: Recipe, generator: torch.Generator) -> list[CurvePoint]: ...

    def describe(self, recipe: Recipe) -> str: ...


METHODS: dict[str, Method] = {
    "ladimo": ladimo.Ladimo(),
    "moefication": moefication.Moefication(),
    "cmoe": cmoe.Cmoe(),
    "static": static.Static(),
    "elastic": Elastic(),
}


def get_method(name: str) -> Method:
    """Raises ValueError naming the known methods."""
    try:
        return METHODS[name]
    except KeyError:
        raise ValueError(f"method {name!r} is unknown; known: {', '.join(sorted(METHODS))}") from None
