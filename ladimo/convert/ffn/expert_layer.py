"""Runs an expert layer under a rule, and finds its error. Legend: T tokens, D hidden_size, E experts, K experts per token."""

import math

import torch
from torch import Tensor, nn

from ladimo.convert.ffn.layer_data import target_variance
from ladimo.model.experts import apply_experts_grouped
from ladimo.model.moe import ExpertLayer
from ladimo.model.nested.refinement import refine_neurons
from ladimo.model.nested.weights import NestedWeights
from ladimo.model.routing import select_experts
from ladimo.policy import LayerRule, RoutingPolicy


def route(layer: ExpertLayer, inputs: Tensor, rule: LayerRule) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [T, D] -> router_logits [T, E], and topk_weights and topk_ids [T, K] with K = rule.top_k."""
    rows, allowed = RoutingPolicy("rule", "", (rule,)).to_rows(layer.config.num_experts)
    router_logits = layer.gate(inputs)
    row = torch.tensor(rows[0], device=inputs.device).expand(len(inputs), -1)
    mask = torch.tensor(allowed, device=inputs.device).expand(len(inputs), -1)
    topk_weights, topk_ids = select_experts(router_logits, row, mask, layer.config, layer.gate.e_score_correction_bias)
    return router_logits, topk_weights[:, : rule.top_k], topk_ids[:, : rule.top_k]


def run_rule(layer: ExpertLayer, inputs: Tensor, rule: LayerRule) -> tuple[Tensor, Tensor, Tensor | None]:
    """The layer under a rule: inputs [T, D] -> outputs [T, D], topk_ids [T, K], and whether each neuron is refined, bool
    [T, E F]; None if the rule refines none."""
    _, topk_weights, topk_ids = route(layer, inputs, rule)
    if rule.refine is None:
        return run_experts(layer, inputs, topk_weights, topk_ids, rule.bits), topk_ids, None
    gate_up: Tensor | NestedWeights = layer.experts.gate_up_proj
    down: Tensor | NestedWeights = layer.experts.down_proj
    assert isinstance(gate_up, NestedWeights) and isinstance(down, NestedWeights)
    floors, norms = torch.full((len(inputs),), rule.refine, device=inputs.device), layer.experts.get_buffer("norms")
    up_bias = layer.experts.up_bias
    out, refined = refine_neurons(inputs, topk_weights, topk_ids, gate_up, down, norms, floors, up_bias)
    return layer.add_shared(out, inputs), topk_ids, refined.flatten(1)


def run_experts(layer: ExpertLayer, inputs: Tensor, topk_weights: Tensor, topk_ids: Tensor, bits: int | None = None) -> Tensor:
    """[T, D] -> [T, D]. Tokens are grouped by expert on every device, because there are many tokens and gradients, and no graph
    is captured. `bits`: how many bits of nested weights are read; None: all."""
    weights: list[Tensor] = []
    for stored in (layer.experts.gate_up_proj, layer.experts.down_proj):
        nested: Tensor | NestedWeights = stored
        weights.append(nested.at(bits or math.inf, inputs.dtype) if isinstance(nested, NestedWeights) else nested)
    gate_up, down = weights
    out = apply_experts_grouped(inputs, topk_weights, topk_ids, gate_up, down, layer.experts.up_bias)
    return layer.add_shared(out, inputs)


def run_ffn(mlp: nn.Module, inputs: Tensor) -> Tensor:
    """A layer's FFN, be it dense or an expert layer under policy `full`: [T, D] -> [T, D]."""
    if not isinstance(mlp, ExpertLayer):
        out: Tensor = mlp(inputs)
        return out
    _, topk_weights, topk_ids = route(mlp, inputs, full_rule(mlp))
    return run_experts(mlp, inputs, topk_weights, topk_ids)


def full_rule(layer: ExpertLayer) -> LayerRule:
    """The layer's rule in policy `full`. Layers are trained under it."""
    return LayerRule.full(layer.config)


@torch.no_grad()
def layer_error(layer: ExpertLayer, inputs: Tensor, targets: Tensor) -> float:
    """Squared error under `full`, divided by the variance of the targets. 0: as good as the FFN itself; 1: as its mean."""
    total, device = 0.0, layer.experts.down_proj.device
    for chunk, target in zip(inputs.split(8192), targets.split(8192), strict=True):
        x = chunk.to(device, torch.float32)
        _, topk_weights, topk_ids = route(layer, x, full_rule(layer))
        total += (run_experts(layer, x, topk_weights, topk_ids) - target.to(device)).pow(2).sum().item()
    return total / targets.numel() / target_variance(targets)
