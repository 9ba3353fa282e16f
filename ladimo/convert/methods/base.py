"""The interface of conversion methods.

A method makes expert layers from the dense model of a run (`ladimo.convert.run`) and puts them into the run's workspace. It
proposes policies for them, and it may add a section to the report. It may work layer by layer
(`ladimo.convert.methods.layerwise`) or on the whole model. The pipeline does the rest, which is the same for all methods: text,
streaming, measurements, frontier and checkpoint.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ladimo.convert.data.calibration import Calibration
from ladimo.convert.policies.candidates import Candidates, ConvertedModel
from ladimo.convert.recipe import Recipe
from ladimo.convert.report.document import MethodView
from ladimo.convert.report.record import Report
from ladimo.convert.run import Run
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.config import FfnKind, ModelConfig, MoeLayerConfig
from ladimo.policy import RoutingPolicy


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of a method.

    layers: the configurations of the converted layers. Their weights are in the workspace.
    entries: one record per candidate layer for report.json, with at least "layer", "converted" and "seconds".
    candidates: makes the candidate policies, at least full, quality, balanced and fast.
    report: further keys of report.json.
    seconds: time of training that is not in the entries.
    own: a checkpoint that is complete except for its policies. If it is set, it is measured and published in place of the dense
    source with these layers.
    """

    layers: Mapping[int, MoeLayerConfig]
    entries: list[dict[str, Any]]
    candidates: Callable[[ConvertedModel], Candidates]
    report: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    own: StreamedModel | None = None


class Method(ABC):
    """A conversion method. name: the value of `--method`. options: the dataclass of the method's own table in the recipe; the
    table has the method's name. ffn_kinds: the FFNs that it can convert (`ModelConfig.ffn_kind`). parallel: it can convert
    layers in several processes or in a cluster."""

    name: ClassVar[str]
    ffn_kinds: ClassVar[tuple[FfnKind, ...]] = ("swiglu",)
    options: ClassVar[type[Any] | None] = None
    parallel: ClassVar[bool] = False

    def resolve(self, recipe: Recipe, config: ModelConfig, device: torch.device) -> Recipe:
        """The recipe, with values that depend on the model's shape and the device filled in."""
        return recipe

    @abstractmethod
    def describe(self, recipe: Recipe) -> str:
        """A few sentences for the report: what the method does, and the paper that it follows."""

    @abstractmethod
    def convert(self, run: Run, calibration: Calibration) -> Converted:
        """Run the stages that make the expert layers. Each stage can be resumed; see `Workspace.stage`."""

    @abstractmethod
    def reprofile(
        self, recipe: Recipe, model: ConvertedModel, stored: Mapping[str, RoutingPolicy], blocks: Tensor, report: dict[str, Any]
    ) -> Candidates:
        """New candidate policies of a finished checkpoint, from token blocks [B, S] of another text. stored: its policies.
        report: the content of its report.json, in which the method replaces its measurements."""

    def view(self, report: Report) -> MethodView:
        """The method's part of the report."""
        return MethodView()
