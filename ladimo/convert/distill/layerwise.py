"""Layer-wise distillation: trains one expert layer by regression on the outputs of the FFN that it replaces.

Legend: T tokens, D hidden_size, E experts, K experts per token.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.convert.ffn.expert_layer import full_rule, layer_error, route, run_experts
from ladimo.convert.ffn.layer_data import LayerData, target_variance
from ladimo.convert.progress import track
from ladimo.convert.recipe import TrainRecipe
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule

CURVE_POINTS = 10


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Squared error after `step` steps, divided by the variance of the targets. fit: on the training batches, as a mean since
    the last point. holdout: on the holdout."""

    step: int
    fit: float
    holdout: float


def distill_layer(
    layer: ExpertLayer,
    data: LayerData,
    recipe: TrainRecipe,
    generator: torch.Generator,
    rules: Sequence[LayerRule] = (),
) -> list[CurvePoint]:
    """Train the layer in place, in fp32, and return its loss curve. Only the chosen experts are computed.

    Each step runs under one of `rules`, drawn with equal probability, or under `full` if there are none. The loss is the
    squared error, divided by the variance of the targets, so that one value of `balance` suits every layer. If experts are
    weighted by their scores, the router is trained, too, and balance * `balance_loss` is added. If they have weight one, the
    router gets no gradient and does not change. Raises ValueError if the loss diverges.
    """
    device = layer.experts.down_proj.device
    rules = rules or (full_rule(layer),)
    routed = layer.config.expert_weight == "score"
    layer.gate.requires_grad_(routed)
    bias = [] if layer.output_bias is None else [layer.output_bias]
    groups = [{"params": [*layer.experts.parameters(), *bias], "lr": recipe.expert_lr}]
    if routed:
        groups.append({"params": list(layer.gate.parameters()), "lr": recipe.gate_lr})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
    variance = target_variance(data.fit_targets)
    curve: list[CurvePoint] = []
    running: list[Tensor] = []
    for step, batch in batches(len(data.fit_inputs), recipe, generator):
        inputs, targets = (source[batch].to(device, torch.float32) for source in (data.fit_inputs, data.fit_targets))
        rule = rules[int(torch.randint(len(rules), (1,), generator=generator))] if len(rules) > 1 else rules[0]
        router_logits, topk_weights, topk_ids = route(layer, inputs, rule)
        error = F.mse_loss(run_experts(layer, inputs, topk_weights, topk_ids), targets) / variance
        loss = error + recipe.balance * balance_loss(router_logits, topk_ids) if routed else error
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        running.append(error.detach())
        if is_report(step, recipe):
            fit = torch.stack(running).mean().item()
            if not math.isfinite(fit):
                raise ValueError(f"training diverged at step {step}; lower train.expert_lr or train.gate_lr")
            curve.append(CurvePoint(step, fit, layer_error(layer, data.holdout_inputs, data.holdout_targets)))
            running.clear()
    return curve


def batches(num_tokens: int, recipe: TrainRecipe, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """Yield the steps 1 .. recipe.steps, each with the numbers of its tokens. Each token comes once per epoch, except that a
    short rest at the end of an epoch is skipped."""
    order = torch.empty(0, dtype=torch.int64)
    for step in track(range(1, recipe.steps + 1), "steps"):
        if len(order) < min(recipe.batch_tokens, num_tokens):
            order = torch.randperm(num_tokens, generator=generator)
        batch, order = order[: recipe.batch_tokens], order[recipe.batch_tokens :]
        yield step, batch


def is_report(step: int, recipe: TrainRecipe) -> bool:
    """Whether the loss curve has a point after this step. There are CURVE_POINTS points at equal distances, the last at the
    end."""
    return step in {round(recipe.steps * (point + 1) / CURVE_POINTS) for point in range(CURVE_POINTS)}


def learning_rate_factor(step: int, recipe: TrainRecipe) -> float:
    """The factor on the learning rate: linear warm-up, then cosine decay to zero."""
    warmup = recipe.warmup * recipe.steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, recipe.steps - warmup)))


def balance_loss(router_logits: Tensor, topk_ids: Tensor) -> Tensor:
    """E * sum_i f_i P_i, from router_logits [T, E] and topk_ids [T, K] (-1: no expert). f_i is the share of tokens that chose
    expert i, and P_i is the expert's mean softmax score. With an even load, the loss is K. This is equation 4 of Switch
    Transformers (arXiv 2101.03961) for K experts per token.
    """
    num_tokens, num_experts = router_logits.shape
    share = torch.bincount(topk_ids.flatten() + 1, minlength=num_experts + 1)[1:] / num_tokens
    return num_experts * (share * router_logits.softmax(dim=-1).mean(dim=0)).sum()
