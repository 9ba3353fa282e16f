"""One conversion: the objects that all of its stages use."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ladimo.convert.recipe import Recipe
from ladimo.convert.source import model_parameters
from ladimo.convert.streamed_model import StreamedModel, load_experts
from ladimo.convert.workspace import Workspace
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.moe import ExpertLayer


@dataclass(frozen=True)
class Run:
    """One conversion. Its result depends only on the arguments, and not on interruptions.

    candidates: the numbers of the layers that may be converted. jobs: the number of processes that work on layers; with Ray,
    that of tasks, where None means as many as the cluster can run. ray: the address of a Ray cluster that works on the layers.
    """

    workspace: Workspace
    recipe: Recipe
    dense: StreamedModel
    candidates: tuple[int, ...]
    jobs: int | None = 1
    ray: str | None = None

    def generator(self, layer: int) -> torch.Generator:
        """A generator that is seeded by the recipe and the layer, so that a layer does not depend on the other layers."""
        return torch.Generator().manual_seed(layer_seed(self.recipe, layer))

    def experts(self, index: int) -> ExpertLayer:
        """A finished expert layer, loaded from the workspace."""
        return load_experts(self.workspace.layer_reader(index), self.workspace.layer_config(index), self.dense)

    def config(self, layers: Mapping[int, MoeLayerConfig]) -> ModelConfig:
        """The model's configuration with these layers converted."""
        depth = range(self.dense.config.num_hidden_layers)
        return dataclasses.replace(self.dense.config, layers=tuple(layers.get(index) for index in depth))

    def tensors(self, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the source, with finished experts in place of the FFNs that are converted in `config`."""
        readers = {index: self.workspace.layer_reader(index) for index in config.moe_layer_indices}
        for name, _ in model_parameters(config):
            prefix, _, rest = name.partition(".mlp.")
            index = int(prefix.rpartition(".")[2]) if rest else -1
            yield name, readers[index].get(rest) if index in readers else self.dense.reader.get(name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only names and values. Worker processes open the files and load the weights themselves, on the first GPU that
        they are given if there are any. A worker may have another working directory."""
        directories = self.workspace.out.absolute(), self.workspace.arguments, self.dense.directory.absolute()
        place = (*directories, str(self.dense.device) if self.ray is None else self.dense.device.type)
        return _run, (*place, self.recipe, self.candidates)


def layer_seed(recipe: Recipe, layer: int) -> int:
    return recipe.seed * 100_003 + layer


def _run(
    out: Path, arguments: Mapping[str, Any], directory: Path, device: str, recipe: Recipe, candidates: tuple[int, ...]
) -> Run:
    return Run(Workspace(out, arguments), recipe, StreamedModel(directory, torch.device(device)), candidates)
