"""The stages of a conversion that are the method elastic's own: damage of each width, widths per budget, substitutes.

Like all stages they are functions from files to files of the workspace. Legend: E experts, D hidden_size, F
moe_intermediate_size.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ladimo.convert.choose_policy import NAMED, Option, Rules, interpolate, solve
from ladimo.convert.distill import LayerData
from ladimo.convert.evaluate import measure
from ladimo.convert.methods.elastic import solved_substitute, with_substitutes
from ladimo.convert.nested import nested_widths
from ladimo.convert.polish import Student, polish
from ladimo.convert.recipe import Recipe
from ladimo.convert.teacher import StreamedModel
from ladimo.convert.workspace import Workspace
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule

logger = logging.getLogger(__name__)

Widths = tuple[int, ...]  # experts kept per layer, E where nothing is left out


def static_rule(first: int, count: int) -> LayerRule:
    """The experts first .. first + count - 1, whatever the token."""
    return LayerRule(top_k=count, renormalize=False, experts=tuple(range(first, first + count)))


def solve_layer(workspace: Workspace, index: int, mlp: GatedMLP, data: LayerData, recipe: Recipe) -> dict[str, Any]:
    """Order and repairs of one layer into the workspace; its record."""
    widths = nested_widths(mlp, data, recipe.split.experts, recipe.elastic.ridge)
    repairs = {f"repair.{count}": repaired for count, repaired in widths.repairs.items()}
    workspace.save_tensors(f"layers/{index}/nested.safetensors", {"order": widths.order, **repairs})
    errors = {str(count): error for count, error in widths.errors.items()}
    oracle = {str(count): error for count, error in widths.oracle_errors.items()}
    return {"nested": {"errors": errors, "oracle_errors": oracle, "ridge": widths.ridge}}


@dataclass(frozen=True, slots=True)
class ElasticStages:
    """After every candidate layer is solved."""

    workspace: Workspace
    recipe: Recipe
    dense: StreamedModel
    candidates: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return self.recipe.split.experts

    def damage(self, holdout: Tensor) -> dict[int, dict[int, float]]:
        """KL divergence from the dense model with layer i alone at n experts, for a few n: a stage."""

        def make() -> dict[str, Any]:
            experts, depth = self.num_experts, self.dense.config.num_hidden_layers
            counts = sorted({1, experts // 4, experts // 2, 3 * experts // 4} - {0, experts})
            firsts = {count: experts + sum(counts[:place]) for place, count in enumerate(counts)}
            reference: Rules = (None,) * depth

            def alone(index: int, count: int) -> Rules:
                rule = static_rule(firsts[count], count)
                return tuple(rule if layer == index else None for layer in range(depth))

            def probe(index: int) -> ExpertLayer:
                return self._layer(index, [self._solved(index, count) for count in counts])

            sequences = max(1, self.recipe.elastic.scan_tokens // holdout.shape[1])
            variants = {(index, count): alone(index, count) for index in self.candidates for count in counts}
            measured = measure(self.dense, probe, holdout[:sequences], [reference, *variants.values()], reference)
            found: dict[str, dict[str, float]] = {str(index): {} for index in self.candidates}
            for (index, count), rules in variants.items():
                found[str(index)][str(count)] = measured[rules].kl or 0.0
            return {"damage": found}

        record = self.workspace.stage("damage", make)["damage"]
        return {int(index): {int(count): kl for count, kl in layer.items()} for index, layer in record.items()}

    def budgets(self, damage: Mapping[int, Mapping[int, float]]) -> list[Widths]:
        """The widths of every layer for every budget of the recipe: a stage."""

        def make() -> dict[str, Any]:
            experts, depth = self.num_experts, self.dense.config.num_hidden_layers
            whole = MoeLayerConfig(experts, experts, self._expert_size, expert_weight="one", router="none")
            layers = tuple(whole if index in self.candidates else None for index in range(depth))
            config = self._config(layers)
            options: dict[int, list[Option]] = {}
            for index, known in damage.items():
                record = self.workspace.layer_record(index)
                assert record is not None
                errors = {int(count): error for count, error in record["nested"]["errors"].items()}
                measured = [errors[count] for count in known]
                options[index] = [Option(static_rule(0, experts), experts, 0.0)] + [
                    Option(static_rule(0, count), count, interpolate(measured, list(known.values()), error))
                    for count, error in errors.items()
                ]
            widths = []
            for target in self.recipe.elastic.budgets:
                if self.recipe.elastic.uniform:
                    alike = [count for count in range(1, experts + 1) if self._uniform_cost(config, count) <= target]
                    widths.append([max(alike, default=1) if index in damage else experts for index in range(depth)])
                    continue
                rules = solve(options, config, target)
                widths.append([experts if rule is None else rule.top_k for rule in rules])
            return {"widths": widths}

        record = self.workspace.stage("budgets", make)
        for target, widths in zip(self.recipe.elastic.budgets, record["widths"], strict=True):
            logger.info("budget %.0f%%: %s of %d experts per layer", 100 * target, widths, self.num_experts)
        return [tuple(widths) for widths in record["widths"]]

    def substitutes(self, budgets: Sequence[Widths], fit: Tensor, holdout: Tensor) -> list[list[dict[str, Any]]]:
        """Distil the substitutes of every budget end to end where the model is small enough: a stage. The curves."""

        def make() -> dict[str, Any]:
            started = time.monotonic()
            curves: list[list[dict[str, Any]]] = [[] for _ in budgets]
            if self._trains:
                teacher = StreamedModel(self.dense.directory, self.dense.device, "float32")
                students: list[Student] = [
                    [
                        self._narrow(*self._solved(index, count)) if count < self.num_experts else None
                        for index, count in enumerate(widths)
                    ]
                    for widths in budgets
                ]
                sequences = max(1, self.recipe.elastic.scan_tokens // holdout.shape[1])
                generator = torch.Generator().manual_seed(self.recipe.seed)
                points = polish(teacher, students, fit, holdout[:sequences], self.recipe.elastic, generator)
                curves = [[asdict(point) for point in curve] for curve in points]
                self.workspace.save_tensors("substitutes.safetensors", self._trained_tensors(students))
            elif self.recipe.elastic.steps:
                logger.info("the model is too large to distil it end to end, substitutes stay as solved")
            return {"curves": curves, "seconds": time.monotonic() - started}

        curves: list[list[dict[str, Any]]] = self.workspace.stage("substitutes", make)["curves"]
        for target, curve in zip(self.recipe.elastic.budgets, curves, strict=True):
            if curve:
                first, last = curve[0]["holdout"], curve[-1]["holdout"]
                kept = "kept" if last < first else "left as solved"
                logger.info("budget %.0f%%: holdout KL %.4f -> %.4f, %s", 100 * target, first, last, kept)
        return curves

    def finish(self, budgets: Sequence[Widths], dtype: torch.dtype) -> None:
        """The finished expert layers into the workspace: the exact partition, then each budget's substitutes."""
        trained = self.workspace.load_tensors("substitutes.safetensors") if self._trains else {}
        for index in self.converted(budgets):
            pairs = []
            for number, widths in enumerate(budgets):
                if widths[index] < self.num_experts:
                    names = (f"{number}.{index}.gate_up", f"{number}.{index}.down")
                    solved = None if self._trains else self._solved(index, widths[index])
                    pairs.append(solved or (trained[names[0]], trained[names[1]]))
            layer = self._layer(index, pairs)
            self.workspace.save_layer(index, layer, dtype)
            record = self.workspace.layer_record(index)
            assert record is not None
            known = {key: value for key, value in record.items() if key != "config"}
            self.workspace.finish_layer(index, layer.config, known)

    def converted(self, budgets: Sequence[Widths]) -> tuple[int, ...]:
        """Layers that some budget narrows."""
        return tuple(index for index in self.candidates if any(widths[index] < self.num_experts for widths in budgets))

    def budget_names(self) -> list[str]:
        """quality, balanced, those between by their share, fast."""
        return [NAMED[1], NAMED[2], *(f"active-{100 * target:g}" for target in self.recipe.elastic.budgets[2:-1]), NAMED[3]]

    def policies(self, budgets: Sequence[Widths]) -> dict[str, Rules]:
        """full and one policy per budget, the named ones first."""
        converted, experts = self.converted(budgets), self.num_experts
        depth = self.dense.config.num_hidden_layers
        full = tuple(static_rule(0, experts) if index in converted else None for index in range(depth))
        names = self.budget_names()
        chosen: dict[str, Rules] = {}
        firsts = dict.fromkeys(converted, experts)
        for name, widths in zip(names, budgets, strict=True):
            rules = list(full)
            for index in converted:
                if widths[index] < experts:
                    rules[index] = static_rule(firsts[index], widths[index])
                    firsts[index] += widths[index]
            chosen[name] = tuple(rules)
        order = dict.fromkeys(("full", *NAMED[1:], *names))
        return {"full": full, **{name: chosen[name] for name in order if name != "full"}}

    def _layer(self, index: int, substitutes: list[tuple[Tensor, Tensor]]) -> ExpertLayer:
        mlp = self.dense.layer(index).mlp
        assert isinstance(mlp, GatedMLP)
        return with_substitutes(mlp, self._nested(index)["order"], self.num_experts, substitutes)

    def _solved(self, index: int, count: int) -> tuple[Tensor, Tensor]:
        mlp, nested = self.dense.layer(index).mlp, self._nested(index)
        assert isinstance(mlp, GatedMLP)
        return solved_substitute(mlp, nested["order"], self.num_experts, count, nested[f"repair.{count}"])

    def _nested(self, index: int) -> dict[str, Tensor]:
        return self.workspace.load_tensors(f"layers/{index}/nested.safetensors")

    @property
    def _trains(self) -> bool:
        ends = sum(parameter.numel() for parameter in self.dense.ends.parameters())
        size = ends + self.dense.config.dense_parameters
        return self.recipe.elastic.steps > 0 and size <= self.recipe.elastic.max_parameters

    def _narrow(self, gate_up: Tensor, down: Tensor) -> GatedMLP:
        """Substitutes as one narrow FFN, in fp32 on the device."""
        gate, up = gate_up.chunk(2, dim=1)  # [n, F, D]
        mlp = GatedMLP(down.shape[1], gate.shape[0] * gate.shape[1])
        weights = {"gate_proj": gate.flatten(0, 1), "up_proj": up.flatten(0, 1), "down_proj": down.transpose(0, 1).flatten(1)}
        mlp.load_state_dict({f"{name}.weight": weight.clone() for name, weight in weights.items()})
        return mlp.to(self.dense.device)

    def _trained_tensors(self, students: Sequence[Student]) -> dict[str, Tensor]:
        """The inverse of `_narrow`, by "budget.layer.name"."""
        tensors = {}
        for number, student in enumerate(students):
            for index, mlp in enumerate(student):
                if mlp is not None:
                    count = mlp.gate_proj.out_features // self._expert_size
                    gate, up, down = (layer.weight.detach().cpu() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
                    parts = gate.view(count, -1, gate.shape[1]), up.view(count, -1, up.shape[1])
                    tensors[f"{number}.{index}.gate_up"] = torch.cat(parts, dim=1)
                    tensors[f"{number}.{index}.down"] = down.view(down.shape[0], count, -1).transpose(0, 1)
        return tensors

    @staticmethod
    def _uniform_cost(config: ModelConfig, count: int) -> float:
        return config.active_parameters_ratio(tuple(None if layer is None else float(count) for layer in config.layers))

    @property
    def _expert_size(self) -> int:
        return -(-self.dense.config.intermediate_size // self.num_experts)

    def _config(self, layers: tuple[MoeLayerConfig | None, ...]) -> ModelConfig:
        return dataclasses.replace(self.dense.config, layers=layers)
