"""The layers of method elastic. Each is solved alone, and the later stages read the result."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.ffn.neuron_ordering import order_neurons
from ladimo.convert.kept import Kept
from ladimo.convert.methods.elastic.recipe import ElasticRecipe
from ladimo.convert.methods.elastic.substitutes import (
    Weights,
    fixed_layer,
    routed_counts,
    routed_substitute,
    solved_substitute,
    with_substitutes,
)
from ladimo.convert.run import Run
from ladimo.model.layers import Ffn
from ladimo.model.moe import ExpertLayer

KEPT_BYTES = 2**30  # the most bytes of solved layers that stay in memory

logger = logging.getLogger(__name__)


def is_trained_whole(run: Run) -> bool:
    """Whether the model is small enough to be distilled end to end."""
    elastic = run.recipe.section(ElasticRecipe)
    ends = sum(parameter.numel() for parameter in run.dense.ends.parameters())
    return elastic.steps > 0 and ends + run.dense.config.dense_parameters <= elastic.max_parameters


def contested_budgets(run: Run) -> tuple[int, ...]:
    """The numbers of the budgets for which routed experts are tried."""
    elastic = run.recipe.section(ElasticRecipe)
    able = is_trained_whole(run) and routed_counts(run.recipe.split.experts) and not elastic.uniform
    return tuple(number for number, target in enumerate(elastic.budgets) if able and target <= elastic.routed)


def solve_layer(run: Run, index: int, mlp: Ffn, data: LayerData) -> None:
    """Solve one layer, and save its neuron order and its repairs in the workspace. If a budget may route, save its routed
    substitutes, too."""
    started, experts, elastic = time.monotonic(), run.recipe.split.experts, run.recipe.section(ElasticRecipe)
    ordering = order_neurons(mlp, data, experts, elastic.ridge)
    repairs = {f"repair.{count}": repaired for count, repaired in ordering.repairs.items()}
    run.workspace.save_tensors(_solved_name(index), {"order": ordering.order, **repairs})
    if contested_budgets(run):
        routed = routed_substitute(mlp, data, run.recipe, elastic.routed_steps, run.generator(index))
        run.workspace.save_tensors(_routed_name(index), routed)
    record = {
        "nested": {
            "errors": {str(count): error for count, error in ordering.errors.items()},
            "oracle_errors": {str(count): error for count, error in ordering.oracle_errors.items()},
            "ridge": ordering.ridge,
        },
        "seconds": time.monotonic() - started,
    }
    partition = fixed_layer(experts, -(-mlp.up_proj.out_features // experts), mlp)
    run.workspace.finish_layer(index, partition, record)
    half = ordering.errors.get(experts // 2, 0.0)
    logger.info("layer %d: holdout error %.3f of the FFN's variance at half width, %.0f s", index, half, record["seconds"])


@dataclass(frozen=True, slots=True)
class SolvedLayer:
    """A dense FFN with the order [N] of its neurons. repairs[n]: the columns [D, K] of down_proj for the first n experts."""

    mlp: Ffn
    num_experts: int
    order: Tensor
    repairs: dict[int, Tensor]

    def substitute(self, count: int) -> Weights:
        """The first `count` experts, with down_proj solved again."""
        return solved_substitute(self.mlp, self.order, self.num_experts, count, self.repairs[count])

    def with_substitutes(self, fixed: Sequence[Weights], routed: Sequence[Weights] = ()) -> ExpertLayer:
        return with_substitutes(self.mlp, self.order, self.num_experts, fixed, routed)


class SolvedLayers:
    """The solved layers of a run, by number. Layers that fit in memory are read only once."""

    def __init__(self, run: Run, kept_bytes: int = KEPT_BYTES) -> None:
        self._run = run
        self._layers: Kept[SolvedLayer] = Kept(kept_bytes, _num_bytes)

    def __getitem__(self, index: int) -> SolvedLayer:
        return self._layers.get(index, lambda: self._load(index))

    def routed(self, index: int) -> Weights:
        """The routed substitutes, before the end-to-end stage."""
        return self._run.workspace.load_tensors(_routed_name(index))

    def _load(self, index: int) -> SolvedLayer:
        tensors = self._run.workspace.load_tensors(_solved_name(index))
        order = tensors.pop("order")
        repairs = {int(name.removeprefix("repair.")): repaired for name, repaired in tensors.items()}
        return SolvedLayer(self._run.dense.ffn(index), self._run.recipe.split.experts, order, repairs)


def _num_bytes(layer: SolvedLayer) -> int:
    return sum(repaired.nbytes for repaired in layer.repairs.values())


def _solved_name(index: int) -> str:
    return f"layers/{index}/nested.safetensors"


def _routed_name(index: int) -> str:
    return f"layers/{index}/routed.safetensors"
