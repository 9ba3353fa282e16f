"""Trains the substitutes of method elastic's plans: end to end, or layer by layer if the model is too large for that."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ladimo.convert.data.calibration import Calibration
from ladimo.convert.distill.end_to_end import Student, distill_end_to_end
from ladimo.convert.distill.layerwise import distill_layer
from ladimo.convert.distill.streamed import run_students
from ladimo.convert.ffn.expert_layer import layer_error
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.ffn.split import contiguous_partition, split_ffn
from ladimo.convert.methods.elastic.layers import SolvedLayers, is_trained_whole
from ladimo.convert.methods.elastic.plans import Plan, TrainedPlan
from ladimo.convert.methods.elastic.recipe import ElasticRecipe
from ladimo.convert.methods.elastic.substitutes import (
    Weights,
    as_experts,
    as_ffn,
    fixed_layer,
    keep_output_bias,
    routed_layer,
    weights_of,
)
from ladimo.convert.run import Run
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.moe import ExpertLayer

TRAINED = "substitutes.safetensors"  # the substitutes that were distilled end to end
LAYER_LR_SIZE = 128  # the hidden size for which the recipe gives layer_lr

logger = logging.getLogger(__name__)


def train_plans(run: Run, layers: SolvedLayers, plans: Sequence[Plan], calibration: Calibration) -> list[TrainedPlan]:
    """The stage that trains the substitutes of all plans. Returns the plans to keep. A plan with routed layers is kept only if
    it is clearly better than the fixed plan of its budget."""

    def make() -> dict[str, Any]:
        started = time.monotonic()
        if is_trained_whole(run):
            kept = _end_to_end(run, layers, plans, calibration)
        elif run.recipe.section(ElasticRecipe).steps:
            logger.info("the model is too large to be distilled end to end, so it is distilled layer by layer")
            kept = _layer_by_layer(run, layers, plans, calibration)
        else:
            kept = [TrainedPlan(plan, number) for number, plan in enumerate(plans)]
        entries = [
            {**asdict(one.plan), "number": one.number, "curve": one.curve, "layer_errors": one.layer_errors} for one in kept
        ]
        return {"kept": entries, "seconds": time.monotonic() - started}

    record = run.workspace.stage("substitutes", make)
    return [
        TrainedPlan(Plan.from_dict(raw), raw["number"], raw["curve"], raw.get("layer_errors", {})) for raw in record["kept"]
    ]


def finish_layers(run: Run, layers: SolvedLayers, plans: Sequence[TrainedPlan], converted: Sequence[int]) -> None:
    """Save the finished expert layers in the workspace. Each has the exact partition, then the fixed substitutes of the plans,
    then the routed ones."""
    elastic, num_experts = run.recipe.section(ElasticRecipe), run.recipe.split.experts
    trained = run.workspace.load_tensors(TRAINED) if is_trained_whole(run) else {}

    def weights(one: TrainedPlan, index: int) -> Weights:
        if not elastic.steps:
            return layers[index].substitute(one.plan.widths[index])
        if not is_trained_whole(run):
            return run.workspace.load_tensors(f"{_student_name(index, one.number)}.safetensors")
        prefix = f"{one.number}.{index}."
        return {name.removeprefix(prefix): weight for name, weight in trained.items() if name.startswith(prefix)}

    for index in converted:
        narrowed = [one for one in plans if one.plan.widths[index] < num_experts]
        fixed = [weights(one, index) for one in narrowed if index not in one.plan.routed]
        routed = [weights(one, index) for one in narrowed if index in one.plan.routed]
        layer = layers[index].with_substitutes(fixed, routed)
        run.workspace.save_layer(index, layer, run.dense.stored_dtype)
        known = {key: value for key, value in run.workspace.finished_record(index).items() if key != "config"}
        run.workspace.finish_layer(index, layer.config, known)


def _end_to_end(run: Run, layers: SolvedLayers, plans: Sequence[Plan], calibration: Calibration) -> list[TrainedPlan]:
    elastic = run.recipe.section(ElasticRecipe)
    exact = run.dense.dtype == torch.float32
    teacher = run.dense if exact else StreamedModel(run.dense.directory, run.dense.device, "float32")
    students = _students(run, layers, plans)
    generator = torch.Generator().manual_seed(run.recipe.seed)
    holdout = scanned(calibration.holdout, elastic)
    curves = distill_end_to_end(teacher, students, calibration.fit, holdout, elastic.end_to_end, generator)
    reached = [min(point.holdout for point in curve if point.holdout is not None) for curve in curves]
    fixed = {plan.budget: kl for plan, kl in zip(plans, reached, strict=True) if not plan.routed}
    kept = []
    for number, (plan, curve, kl) in enumerate(zip(plans, curves, reached, strict=True)):
        wins = not plan.routed or kl <= (1 - elastic.routed_margin) * fixed[plan.budget]
        if wins:
            kept.append(TrainedPlan(plan, number, [asdict(point) for point in curve]))
        name, outcome = "routed" if plan.routed else "fixed", "" if wins else ", dropped"
        target = 100 * elastic.budgets[plan.budget]
        logger.info("budget %.0f%%, %s: holdout KL %.4f -> %.4f%s", target, name, curve[0].kl, kl, outcome)
    tensors: dict[str, Tensor] = {}
    for number, student in enumerate(students):
        for index, mlp in enumerate(student):
            if mlp is not None:
                cut = weights_of(mlp) if isinstance(mlp, ExpertLayer) else as_experts(mlp, plans[number].widths[index])
                tensors |= {f"{number}.{index}.{name}": weight for name, weight in cut.items()}
    run.workspace.save_tensors(TRAINED, tensors)
    return kept


def _students(run: Run, layers: SolvedLayers, plans: Sequence[Plan]) -> list[Student]:
    """The substitutes of all plans before training, in fp32 on the device."""
    num_experts = run.recipe.split.experts
    students: list[list[Any]] = [[] for _ in plans]
    for index in range(run.dense.config.num_hidden_layers):
        for student, plan in zip(students, plans, strict=True):
            count = plan.widths[index]
            if count == num_experts:
                student.append(None)
            elif index in plan.routed:
                layer, weights = routed_layer(layers[index].mlp, num_experts, count), layers.routed(index)
                layer.gate.load_state_dict({"weight": weights.pop("gate")})
                layer.experts.load_state_dict(weights)
                student.append(layer.float())
            else:
                student.append(as_ffn(layers[index].substitute(count), layers[index].mlp).to(run.dense.device))
    return list(students)


def _layer_by_layer(run: Run, layers: SolvedLayers, plans: Sequence[Plan], calibration: Calibration) -> list[TrainedPlan]:
    """Train every layer of every plan by regression on the student's own inputs. Layers in the workspace are not trained
    again."""
    num_fit, num_experts = calibration.fit.numel(), run.recipe.split.experts

    def substitute(index: int, number: int, inputs: Tensor, targets: Tensor) -> torch.nn.Module | None:
        count, name = plans[number].widths[index], _student_name(index, number)
        if count == num_experts:
            return None
        data = LayerData.cut(inputs, targets, num_fit)
        run.workspace.stage(name, lambda: {"errors": _distill_layer(run, layers, index, count, data, name)})
        return as_ffn(run.workspace.load_tensors(f"{name}.safetensors"), layers[index].mlp).to(run.dense.device)

    run_students(run.dense, torch.cat((calibration.fit, calibration.holdout)), len(plans), substitute)
    trained = []
    for number, plan in enumerate(plans):
        narrowed = [index for index, count in enumerate(plan.widths) if count < num_experts]
        errors = {str(index): run.workspace.record(_student_name(index, number))["errors"] for index in narrowed}
        before, after = (sum(pair[place] for pair in errors.values()) / len(errors) for place in (0, 1))
        target = 100 * run.recipe.section(ElasticRecipe).budgets[plan.budget]
        logger.info("budget %.0f%%: holdout error %.3f -> %.3f, mean over its layers", target, before, after)
        trained.append(TrainedPlan(plan, number, layer_errors=errors))
    return trained


def _distill_layer(run: Run, layers: SolvedLayers, index: int, count: int, data: LayerData, name: str) -> tuple[float, float]:
    """Train one substitute, and save the solved or the trained one in the workspace, whichever is better on the holdout.
    Returns the error before and after."""
    elastic, solved = run.recipe.section(ElasticRecipe), layers[index].substitute(count)
    whole = as_ffn(solved, layers[index].mlp).to(run.dense.device)
    width = whole.up_proj.out_features
    layer = keep_output_bias(split_ffn(whole, contiguous_partition(width, 1), fixed_layer(1, width, whole), {}))
    before = layer_error(layer, data.holdout_inputs, data.holdout_targets)
    rate = elastic.layer_lr * LAYER_LR_SIZE / run.dense.config.hidden_size
    train = dataclasses.replace(
        run.recipe.train, steps=elastic.steps, batch_tokens=elastic.batch_tokens, expert_lr=rate, weight_decay=0.0
    )
    distill_layer(layer, data, train, run.generator(index))
    after = layer_error(layer, data.holdout_inputs, data.holdout_targets)
    if after < before:
        whole = as_ffn(layer.experts.state_dict(), whole)
    run.workspace.save_tensors(f"{name}.safetensors", as_experts(whole, count))
    return before, min(before, after)


def scanned(blocks: Tensor, elastic: ElasticRecipe) -> Tensor:
    """The first scan_tokens tokens, as whole blocks [B, S]."""
    return blocks[: max(1, elastic.scan_tokens // blocks.shape[1])]


def _student_name(index: int, number: int) -> str:
    """The name in the workspace of a plan's substitute of one layer, if it was distilled layer by layer."""
    return f"layers/{index}/student-{number}"
