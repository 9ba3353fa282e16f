"""One conversion under way: what every stage of it reads and writes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ladimo.convert.recipe import Recipe
from ladimo.convert.streamed_model import StreamedModel, load_experts
from ladimo.convert.workspace import Workspace
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.moe import ExpertLayer


@dataclass(frozen=True)
class Run:
    """One conversion under way. What a method makes of it depends on the arguments alone, never on what was resumed.

    candidates: the layers that may be converted. jobs: processes to work on layers side by side.
    """

    workspace: Workspace
    recipe: Recipe
    dense: StreamedModel
    candidates: tuple[int, ...]
    jobs: int = 1

    def generator(self, layer: int) -> torch.Generator:
        """Seeded by the recipe and the layer, so that a layer does not depend on which others are worked on."""
        return torch.Generator().manual_seed(layer_seed(self.recipe, layer))

    def experts(self, index: int) -> ExpertLayer:
        """A finished expert layer, as stored."""
        return load_experts(self.workspace.layer_reader(index), self.workspace.layer_config(index), self.dense)

    def config(self, layers: Mapping[int, MoeLayerConfig]) -> ModelConfig:
        """The model's configuration with these layers converted."""
        depth = range(self.dense.config.num_hidden_layers)
        return dataclasses.replace(self.dense.config, layers=tuple(layers.get(index) for index in depth))

    def __reduce__(self) -> tuple[Any, ...]:
        """For worker processes, which open files and load weights themselves."""
        place = (self.workspace.out, self.workspace.arguments, self.dense.directory, str(self.dense.device))
        return _run, (*place, self.recipe, self.candidates)


def layer_seed(recipe: Recipe, layer: int) -> int:
    return recipe.seed * 100_003 + layer


def _run(
    out: Path, arguments: Mapping[str, Any], directory: Path, device: str, recipe: Recipe, candidates: tuple[int, ...]
) -> Run:
    return Run(Workspace(out, arguments), recipe, StreamedModel(directory, torch.device(device)), candidates)
