"""Running one expert layer under a rule, and its error. Legend: T tokens, D hidden_size, E experts, K experts per token."""

import math

import torch
from torch import Tensor

from ladimo.convert.ffn.layer_data import target_variance
from ladimo.model.experts import apply_experts_grouped
from ladimo.model.moe import ExpertLayer
from ladimo.model.nested import NestedWeights
from ladimo.model.routing import select_experts
from ladimo.policy import LayerRule, RoutingPolicy


def route(layer: ExpertLayer, inputs: Tensor, rule: LayerRule) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [T, D] -> router_logits [T, E], and of the rule's top_k places topk_weights and topk_ids [T, K]."""
    rows, allowed = RoutingPolicy("rule", "", (rule,)).to_rows(layer.config.num_experts)
    router_logits = layer.gate(inputs)
    row = torch.tensor(rows[0], device=inputs.device).expand(len(inputs), -1)
    mask = torch.tensor(allowed, device=inputs.device).expand(len(inputs), -1)
    topk_weights, topk_ids = select_experts(router_logits, row, mask, layer.config, layer.gate.e_score_correction_bias)
    return router_logits, topk_weights[:, : rule.top_k], topk_ids[:, : rule.top_k]


def run_experts(layer: ExpertLayer, inputs: Tensor, topk_weights: Tensor, topk_ids: Tensor, bits: int | None = None) -> Tensor:
    """[T, D] -> [T, D]. Grouped by expert on every device: there are many tokens, gradients, and no graph to capture.
    `bits`: of nested weights that are read, None for all."""
    weights: list[Tensor] = []
    for stored in (layer.experts.gate_up_proj, layer.experts.down_proj):
        nested: Tensor | NestedWeights = stored
        weights.append(nested.at(bits or math.inf, inputs.dtype) if isinstance(nested, NestedWeights) else nested)
    return apply_experts_grouped(inputs, topk_weights, topk_ids, *weights)


def full_rule(layer: ExpertLayer) -> LayerRule:
    """The layer's rule in policy `full`, under which it is trained."""
    return LayerRule.full(layer.config)


@torch.no_grad()
def layer_error(layer: ExpertLayer, inputs: Tensor, targets: Tensor) -> float:
    """Squared error under `full` over the variance of the targets: 0 is the FFN itself, 1 its mean."""
    total, device = 0.0, layer.experts.down_proj.device
    for chunk, target in zip(inputs.split(8192), targets.split(8192), strict=True):
        x = chunk.to(device, torch.float32)
        _, topk_weights, topk_ids = route(layer, x, full_rule(layer))
        total += (run_experts(layer, x, topk_weights, topk_ids) - target.to(device)).pow(2).sum().item()
    return total / targets.numel() / target_variance(targets)
