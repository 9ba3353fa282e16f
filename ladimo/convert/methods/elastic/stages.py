"""The stages of a conversion that are the method elastic's own: damage of each width, a plan per budget, substitutes.

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

from ladimo.convert.distill.end_to_end import Student, distill_end_to_end
from ladimo.convert.distill.layerwise import distill_layer
from ladimo.convert.distill.streamed import run_students
from ladimo.convert.evaluation.measure import measure
from ladimo.convert.evaluation.variants import Rules
from ladimo.convert.ffn.expert_layer import layer_error
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.ffn.neuron_ordering import order_neurons
from ladimo.convert.ffn.split import contiguous_partition, split_ffn
from ladimo.convert.methods.elastic.substitutes import (
    ROUTED_MARGIN,
    Weights,
    routed_counts,
    routed_layer,
    routed_substitute,
    solved_substitute,
    weights_of,
    with_substitutes,
)
from ladimo.convert.policies.choose import NAMED, Option, best_rules, interpolate
from ladimo.convert.recipe import Recipe
from ladimo.convert.streamed_model import StreamedModel
from ladimo.convert.workspace import Workspace
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule

logger = logging.getLogger(__name__)

WIDTH = 128  # hidden size that the recipe's layer_lr is for

Damage = dict[int, dict[int, float]]  # KL in nats by layer and number of experts


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to cover a budget. budget: its number in the recipe. widths: experts that run per token in each layer, E where
    nothing is left out. routed: the layers in which a router chooses them, in the others they are fixed."""

    budget: int
    widths: tuple[int, ...]
    routed: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Plan":
        return cls(raw["budget"], tuple(raw["widths"]), tuple(raw["routed"]))


def _layer_student(index: int, number: int) -> str:
    """Where a plan's substitute of a layer that was distilled alone lies in the workspace."""
    return f"layers/{index}/student-{number}"


def static_rule(first: int, count: int) -> LayerRule:
    """The experts first .. first + count - 1, whatever the token."""
    return LayerRule(top_k=count, renormalize=False, experts=tuple(range(first, first + count)))


def routed_rule(first: int, count: int, num_experts: int) -> LayerRule:
    """`count` of the experts first .. first + num_experts - 1, by the router."""
    return LayerRule(top_k=count, experts=tuple(range(first, first + num_experts)))


def solve_layer(
    workspace: Workspace, index: int, mlp: GatedMLP, data: LayerData, recipe: Recipe, routes: bool
) -> dict[str, Any]:
    """Order, repairs and, where the method routes, routed substitutes of one layer into the workspace; its record."""
    widths = order_neurons(mlp, data, recipe.split.experts, recipe.elastic.ridge)
    repairs = {f"repair.{count}": repaired for count, repaired in widths.repairs.items()}
    workspace.save_tensors(f"layers/{index}/nested.safetensors", {"order": widths.order, **repairs})
    errors = {str(count): error for count, error in widths.errors.items()}
    oracle = {str(count): error for count, error in widths.oracle_errors.items()}
    if routes:
        generator = torch.Generator().manual_seed(recipe.seed * 100_003 + index)
        workspace.save_tensors(f"layers/{index}/routed.safetensors", routed_substitute(mlp, data, recipe, generator))
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

    @property
    def end_to_end(self) -> bool:
        """Whether the model is small enough to be distilled whole; if not, that is done layer by layer."""
        ends = sum(parameter.numel() for parameter in self.dense.ends.parameters())
        size = ends + self.dense.config.dense_parameters
        return self.recipe.elastic.steps > 0 and size <= self.recipe.elastic.max_parameters

    @property
    def contested(self) -> tuple[int, ...]:
        """Numbers of the budgets that routed experts are tried for."""
        elastic = self.recipe.elastic
        able = self.end_to_end and routed_counts(self.num_experts) and not elastic.uniform
        return tuple(number for number, target in enumerate(elastic.budgets) if able and target <= elastic.routed)

    def damage(self, holdout: Tensor) -> tuple[Damage, Damage]:
        """KL divergence from the dense model with layer i alone at n fixed experts, for a few n, and at k routed ones, for all
        k they were trained for: a stage."""

        def make() -> dict[str, Any]:
            experts, depth = self.num_experts, self.dense.config.num_hidden_layers
            counts = sorted({1, experts // 4, experts // 2, 3 * experts // 4} - {0, experts})
            firsts = {count: experts + sum(counts[:place]) for place, count in enumerate(counts)}
            reference: Rules = (None,) * depth
            rules = {(count, False): static_rule(firsts[count], count) for count in counts}
            if self.contested:
                first = experts + sum(counts)
                rules |= {(count, True): routed_rule(first, count, experts) for count in routed_counts(experts)}

            def probe(index: int) -> ExpertLayer:
                routed = [self._routed(index)] if self.contested else []
                return self._layer(index, [self._solved(index, count) for count in counts], routed)

            sequences = max(1, self.recipe.elastic.scan_tokens // holdout.shape[1])
            variants: dict[tuple[int, int, bool], Rules] = {
                (index, *option): tuple(rule if layer == index else None for layer in range(depth))
                for index in self.candidates
                for option, rule in rules.items()
            }
            measured = measure(self.dense, probe, holdout[:sequences], [reference, *variants.values()], reference)
            found: dict[bool, dict[str, dict[str, float]]] = {
                routed: {str(index): {} for index in self.candidates} for routed in (False, True)
            }
            for (index, count, routed), variant in variants.items():
                found[routed][str(index)][str(count)] = measured[variant].kl or 0.0
            return {"damage": found[False], "routed_damage": found[True]}

        record = self.workspace.stage("damage", make)
        fixed, routed = (
            {int(index): {int(count): kl for count, kl in layer.items()} for index, layer in record[name].items()}
            for name in ("damage", "routed_damage")
        )
        return fixed, routed

    def plans(self, damage: Damage, routed_damage: Damage) -> list[Plan]:
        """Fixed widths of every layer for every budget of the recipe, then for the contested ones a mixture with routed layers
        unless it has none: a stage. All leave room for the routers of all, which every policy reads."""

        def make() -> dict[str, Any]:
            experts, depth, elastic = self.num_experts, self.dense.config.num_hidden_layers, self.recipe.elastic
            fixed: dict[int, list[Option]] = {}
            for index, known in damage.items():
                record = self.workspace.layer_record(index)
                assert record is not None
                errors = {int(count): error for count, error in record["nested"]["errors"].items()}
                measured = [errors[count] for count in known]
                fixed[index] = [Option(static_rule(0, experts), experts, 0.0)] + [
                    Option(static_rule(0, count), count, interpolate(measured, list(known.values()), error))
                    for count, error in errors.items()
                ]
            mixed = {
                index: options
                + [Option(routed_rule(0, count, experts), count, kl) for count, kl in routed_damage[index].items()]
                for index, options in fixed.items()
            }

            def plan(number: int, options: Mapping[int, Sequence[Option]], routers: Mapping[int, int]) -> Plan:
                target, config = elastic.budgets[number], self._whole(routers)
                if elastic.uniform:
                    alike = [count for count in range(1, experts + 1) if self._uniform_cost(config, count) <= target]
                    return Plan(number, tuple(max(alike, default=1) if index in damage else experts for index in range(depth)))
                rules = best_rules(options, config, target)
                routed = tuple(i for i, rule in enumerate(rules) if rule is not None and len(rule.experts or ()) > rule.top_k)
                return Plan(number, tuple(experts if rule is None else rule.top_k for rule in rules), routed)

            # First as if every contested budget routed every layer; then with the routers that this asked for and no others.
            most = dict.fromkeys(self.candidates, len(self.contested))
            asked = {number: plan(number, mixed, most).routed for number in self.contested}
            routers = {index: sum(index in routed for routed in asked.values()) for index in self.candidates}
            plans = [plan(number, fixed, routers) for number in range(len(elastic.budgets))]
            for number, routed in asked.items():
                mixture = plan(number, {i: (mixed if i in routed else fixed)[i] for i in fixed}, routers)
                if mixture.routed:
                    plans.append(mixture)
            return {"plans": [asdict(plan) for plan in plans]}

        plans = [Plan.from_dict(raw) for raw in self.workspace.stage("plans", make)["plans"]]
        for plan in plans:
            target, among = 100 * self.recipe.elastic.budgets[plan.budget], f"layers {list(plan.routed)} routed"
            widths, kind = list(plan.widths), among if plan.routed else "fixed"
            logger.info("budget %.0f%%: %s of %d experts per layer, %s", target, widths, self.num_experts, kind)
        return plans

    def substitutes(self, plans: Sequence[Plan], fit: Tensor, holdout: Tensor) -> list[Plan]:
        """Distil the substitutes of every plan, end to end where the model is small enough; the plans worth keeping, one with
        routed layers only if it clearly beats the fixed one: a stage."""

        def make() -> dict[str, Any]:
            started = time.monotonic()
            if not self.end_to_end:
                kept = [{**asdict(plan), "number": number, "curve": []} for number, plan in enumerate(plans)]
                if self.recipe.elastic.steps:
                    logger.info("the model is too large to be distilled end to end: layer by layer")
                    for entry, errors in zip(kept, self._distill_layers(plans, fit, holdout), strict=True):
                        entry["layer_errors"] = errors
                return {"kept": kept, "seconds": time.monotonic() - started}
            teacher = StreamedModel(self.dense.directory, self.dense.device, "float32")
            students = [self._student(plan) for plan in plans]
            sequences = max(1, self.recipe.elastic.scan_tokens // holdout.shape[1])
            generator = torch.Generator().manual_seed(self.recipe.seed)
            curves = distill_end_to_end(teacher, students, fit, holdout[:sequences], self.recipe.elastic, generator)
            reached = [min(point.holdout for point in curve if point.holdout is not None) for curve in curves]
            fixed = {plan.budget: kl for plan, kl in zip(plans, reached, strict=True) if not plan.routed}
            kept = []
            for number, (plan, curve, kl) in enumerate(zip(plans, curves, reached, strict=True)):
                wins = not plan.routed or kl <= (1 - ROUTED_MARGIN) * fixed[plan.budget]
                if wins:
                    kept.append({**asdict(plan), "number": number, "curve": [asdict(point) for point in curve]})
                name = "routed" if plan.routed else "fixed"
                target = 100 * self.recipe.elastic.budgets[plan.budget]
                logger.info(
                    "budget %.0f%%, %s: holdout KL %.4f -> %.4f%s", target, name, curve[0].kl, kl, "" if wins else ", dropped"
                )
            self.workspace.save_tensors("substitutes.safetensors", self._trained_tensors(students))
            return {"kept": kept, "seconds": time.monotonic() - started}

        self.workspace.stage("substitutes", make)
        return self.kept

    @property
    def kept(self) -> list[Plan]:
        """The plans of the finished checkpoint."""
        return [Plan.from_dict(raw) for raw in self.workspace.record("substitutes")["kept"]]

    def finish(self, dtype: torch.dtype) -> None:
        """The finished expert layers into the workspace: the exact partition, then each plan's substitutes, the routed ones
        last."""
        trained = self.workspace.load_tensors("substitutes.safetensors") if self.end_to_end else {}
        numbers = [raw["number"] for raw in self.workspace.record("substitutes")["kept"]]

        def weights(number: int, plan: Plan, index: int) -> Weights:
            if not self.recipe.elastic.steps:
                return self._solved(index, plan.widths[index])
            if not self.end_to_end:
                return self.workspace.load_tensors(f"{_layer_student(index, number)}.safetensors")
            prefix = f"{number}.{index}."
            return {name.removeprefix(prefix): weight for name, weight in trained.items() if name.startswith(prefix)}

        for index in self.converted():
            fixed: list[Weights] = []
            routed: list[Weights] = []
            for number, plan in zip(numbers, self.kept, strict=True):
                if plan.widths[index] < self.num_experts:
                    (routed if index in plan.routed else fixed).append(weights(number, plan, index))
            layer = self._layer(index, fixed, routed)
            self.workspace.save_layer(index, layer, dtype)
            record = self.workspace.layer_record(index)
            assert record is not None
            known = {key: value for key, value in record.items() if key != "config"}
            self.workspace.finish_layer(index, layer.config, known)

    def converted(self) -> tuple[int, ...]:
        """Layers that some plan narrows."""
        return tuple(i for i in self.candidates if any(plan.widths[i] < self.num_experts for plan in self.kept))

    def names(self) -> list[str]:
        """One per plan: quality, balanced, those between by their share, fast. Where a budget has a routed plan it bears the
        name, and the fixed one that name and "-fixed"."""
        shares = (f"active-{100 * target:g}" for target in self.recipe.elastic.budgets[2:-1])
        names = [NAMED[1], NAMED[2], *shares, NAMED[3]]
        routed = {plan.budget for plan in self.kept if plan.routed}
        return [names[plan.budget] + "-fixed" * (plan.budget in routed and not plan.routed) for plan in self.kept]

    def policies(self) -> dict[str, Rules]:
        """full and one policy per plan, the named ones first."""
        converted, experts = self.converted(), self.num_experts
        full = tuple(static_rule(0, experts) if i in converted else None for i in range(self.dense.config.num_hidden_layers))
        rules = {name: list(full) for name in self.names()}
        for index in converted:
            first = experts
            for routed in (False, True):  # the order of the substitutes in a layer
                for name, plan in zip(self.names(), self.kept, strict=True):
                    width = plan.widths[index]
                    if width == experts or (index in plan.routed) != routed:
                        continue
                    rules[name][index] = routed_rule(first, width, experts) if routed else static_rule(first, width)
                    first += experts if routed else width
        order = dict.fromkeys((*NAMED[1:], *rules))
        return {"full": full, **{name: tuple(rules[name]) for name in order}}

    def stored_ratio(self, config: ModelConfig) -> float:
        """Parameters of the finished layers, routers and substitutes included, over the dense model's."""
        return config.active_parameters_ratio(tuple(None if layer is None else layer.num_experts for layer in config.layers))

    def _layer(self, index: int, fixed: Sequence[Weights], routed: Sequence[Weights]) -> ExpertLayer:
        return with_substitutes(self._mlp(index), self._nested(index)["order"], self.num_experts, fixed, routed)

    def _mlp(self, index: int) -> GatedMLP:
        mlp = self.dense.layer(index).mlp
        assert isinstance(mlp, GatedMLP)
        return mlp

    def _solved(self, index: int, count: int) -> Weights:
        nested = self._nested(index)
        return solved_substitute(self._mlp(index), nested["order"], self.num_experts, count, nested[f"repair.{count}"])

    def _routed(self, index: int) -> Weights:
        return self.workspace.load_tensors(f"layers/{index}/routed.safetensors")

    def _nested(self, index: int) -> dict[str, Tensor]:
        return self.workspace.load_tensors(f"layers/{index}/nested.safetensors")

    def _student(self, plan: Plan) -> Student:
        """The plan's substitutes before the end-to-end stage, in fp32 on the device."""
        student: list[GatedMLP | ExpertLayer | None] = []
        for index, count in enumerate(plan.widths):
            if count == self.num_experts:
                student.append(None)
            elif index in plan.routed:
                layer, weights = routed_layer(self._mlp(index), self.num_experts, count), self._routed(index)
                layer.gate.load_state_dict({"weight": weights.pop("gate")})
                layer.experts.load_state_dict(weights)
                student.append(layer.float())
            else:
                student.append(self._narrow(self._solved(index, count)))
        return student

    def _narrow(self, solved: Weights) -> GatedMLP:
        """Fixed substitutes as one narrow FFN, in fp32 on the device."""
        gate, up = solved["gate_up_proj"].chunk(2, dim=1)  # [n, F, D]
        down = solved["down_proj"].transpose(0, 1).flatten(1)
        mlp = GatedMLP(down.shape[0], down.shape[1])
        weights = {"gate_proj": gate.flatten(0, 1), "up_proj": up.flatten(0, 1), "down_proj": down}
        mlp.load_state_dict({f"{name}.weight": weight.clone() for name, weight in weights.items()})
        return mlp.to(self.dense.device)

    def _trained_tensors(self, students: Sequence[Student]) -> dict[str, Tensor]:
        """Substitutes by "plan.layer.name", those of narrow FFNs cut into experts again."""
        tensors: dict[str, Tensor] = {}
        for number, student in enumerate(students):
            for index, mlp in enumerate(student):
                if mlp is None:
                    continue
                weights = weights_of(mlp) if isinstance(mlp, ExpertLayer) else self._cut(mlp)
                tensors |= {f"{number}.{index}.{name}": weight for name, weight in weights.items()}
        return tensors

    def _cut(self, mlp: GatedMLP) -> Weights:
        """A narrow FFN as experts on the host: the inverse of `_narrow`."""
        count = mlp.gate_proj.out_features // self._expert_size
        gate, up, down = (layer.weight.detach().cpu() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        parts = gate.view(count, -1, gate.shape[1]), up.view(count, -1, up.shape[1])
        return {
            "gate_up_proj": torch.cat(parts, dim=1),
            "down_proj": down.view(down.shape[0], count, -1).transpose(0, 1),
        }

    def _distill_layers(self, plans: Sequence[Plan], fit: Tensor, holdout: Tensor) -> list[dict[str, list[float]]]:
        """Every plan's substitutes, layer by layer on what those before them make of the text, into the workspace; by plan and
        layer the error on the holdout before and after. What is there is not trained again."""
        cut = fit.numel()

        def substitute(index: int, number: int, inputs: Tensor, targets: Tensor) -> GatedMLP | None:
            count, name = plans[number].widths[index], _layer_student(index, number)
            if count == self.num_experts:
                return None
            data = LayerData(inputs[:cut], targets[:cut], inputs[cut:], targets[cut:])
            self.workspace.stage(name, lambda: {"errors": self._distill_layer(index, count, data, name)})
            return self._narrow(self.workspace.load_tensors(f"{name}.safetensors"))

        run_students(self.dense, torch.cat((fit, holdout)), len(plans), substitute)
        found: list[dict[str, list[float]]] = []
        for number, plan in enumerate(plans):
            narrowed = [index for index, count in enumerate(plan.widths) if count < self.num_experts]
            errors = {str(index): self.workspace.record(_layer_student(index, number))["errors"] for index in narrowed}
            before, after = (sum(pair[place] for pair in errors.values()) / len(errors) for place in (0, 1))
            target = 100 * self.recipe.elastic.budgets[plan.budget]
            logger.info("budget %.0f%%: holdout error %.3f -> %.3f, mean over its layers", target, before, after)
            found.append(errors)
        return found

    def _distill_layer(self, index: int, count: int, data: LayerData, name: str) -> tuple[float, float]:
        """One substitute, stored as the better on the holdout of solved and trained; its error before and after."""
        elastic, solved = self.recipe.elastic, self._solved(index, count)
        whole, width = self._narrow(solved), count * self._expert_size
        one = MoeLayerConfig(1, 1, width, expert_weight="one", router="none")
        layer = split_ffn(whole, contiguous_partition(width, 1), one, {})
        before = layer_error(layer, data.holdout_inputs, data.holdout_targets)
        rate = elastic.layer_lr * WIDTH / self.dense.config.hidden_size
        train = dataclasses.replace(
            self.recipe.train, steps=elastic.steps, batch_tokens=elastic.batch_tokens, expert_lr=rate, weight_decay=0.0
        )
        generator = torch.Generator().manual_seed(self.recipe.seed * 100_003 + index)
        distill_layer(layer, data, train, generator)
        after = layer_error(layer, data.holdout_inputs, data.holdout_targets)
        if after < before:
            gate, up = layer.experts.gate_up_proj[0].detach().chunk(2)
            weights = {"gate_proj": gate, "up_proj": up, "down_proj": layer.experts.down_proj[0].detach()}
            whole.load_state_dict({f"{part}.weight": weight for part, weight in weights.items()})
        self.workspace.save_tensors(f"{name}.safetensors", self._cut(whole))
        return before, min(before, after)

    def _whole(self, routers: Mapping[int, int]) -> ModelConfig:
        """The model with exact partitions in the candidate layers, and so many routers in each."""
        experts, size = self.num_experts, self._expert_size

        def layer(index: int) -> MoeLayerConfig | None:
            if index not in self.candidates:
                return None
            if not routers[index]:
                return MoeLayerConfig(experts, experts, size, expert_weight="one", router="none")
            count = experts * (1 + routers[index])
            return MoeLayerConfig(count, experts, size, score_function="sigmoid", fixed_experts=experts)

        layers = tuple(layer(index) for index in range(self.dense.config.num_hidden_layers))
        return dataclasses.replace(self.dense.config, layers=layers)

    @staticmethod
    def _uniform_cost(config: ModelConfig, count: int) -> float:
        return config.active_parameters_ratio(tuple(None if layer is None else float(count) for layer in config.layers))

    @property
    def _expert_size(self) -> int:
        return -(-self.dense.config.intermediate_size // self.num_experts)
