"""What a conversion method is, and what it works with.

A method turns the dense model of a run (`ladimo.convert.run`) into expert layers in the run's workspace, says which policies
they may be run under, and adds its part to the report. It may work layer by layer (`ladimo.convert.methods.layerwise`) or on
the whole model. Text, streaming, measurements, the frontier and the checkpoint are the pipeline's and the same for all
methods.
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
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.policy import RoutingPolicy


@dataclass(frozen=True, slots=True)
class Converted:
    """What a method has made. layers: the converted layers' configurations, their weights in the workspace. entries: one record
    per candidate layer for report.json, with at least "layer", "converted" and "seconds". report: further keys of report.json.
    candidates: policies of the model, at least full, quality, balanced and fast.
    seconds: of training besides the entries'. own: a checkpoint, whole but for its policies. It is measured
    in the place of the dense source with these layers, and published."""

    layers: Mapping[int, MoeLayerConfig]
    entries: list[dict[str, Any]]
    candidates: Callable[[ConvertedModel], Candidates]
    report: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    own: StreamedModel | None = None


class Method(ABC):
    """name: of `--method`. options: the dataclass of the method's own table in the recipe, which has the method's name."""

    name: ClassVar[str]
    options: ClassVar[type[Any] | None] = None

    def resolve(self, recipe: Recipe, config: ModelConfig, device: torch.device) -> Recipe:
        """The recipe with what the model's shape and the device decide where it names no value."""
        return recipe

    @abstractmethod
    def describe(self, recipe: Recipe) -> str:
        """A few sentences for the report: what was done, after which paper."""

    @abstractmethod
    def convert(self, run: Run, calibration: Calibration) -> Converted:
        """The stages that make the expert layers. Each is resumable: see `Workspace.stage`."""

    @abstractmethod
    def reprofile(
        self, recipe: Recipe, model: ConvertedModel, stored: Mapping[str, RoutingPolicy], blocks: Tensor, report: dict[str, Any]
    ) -> Candidates:
        """Policies of a finished checkpoint, chosen anew on token blocks [B, S] of another text. stored: its policies.
        report: the record of its report, in which the method renews what it measures."""

    def view(self, report: Report) -> MethodView:
        """The method's part of the report."""
        return MethodView()
