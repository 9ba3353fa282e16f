"""Trains a router to predict how strongly each expert is activated. The experts do not change.

Legend: T tokens, D hidden_size, E experts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.convert.distill.layerwise import CurvePoint, batches, is_report, learning_rate_factor
from ladimo.convert.ffn.expert_layer import layer_error
from ladimo.convert.ffn.hidden_channels import CHUNK_TOKENS
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.recipe import TrainRecipe
from ladimo.model.experts import hidden_channels
from ladimo.model.moe import ExpertLayer


@torch.no_grad()
def activation_mass(layer: ExpertLayer, inputs: Tensor) -> Tensor:
    """The sum of |h| over each expert's hidden channels, such as silu(gate x) * up x: inputs [T, D] -> [T, E] on the host."""
    masses, experts = [], layer.experts
    for chunk in inputs.split(CHUNK_TOKENS):
        x = chunk.to(experts.gate_up_proj.device, torch.float32)
        by_expert = []
        for expert, gate_up in enumerate(experts.gate_up_proj):
            bias = None if experts.up_bias is None else experts.up_bias[expert]
            by_expert.append(hidden_channels(F.linear(x, gate_up), bias).abs().sum(dim=1))
        masses.append(torch.stack(by_expert, dim=1).cpu())
    return torch.cat(masses)


def fit_router(
    layer: ExpertLayer, data: LayerData, masses: Tensor, recipe: TrainRecipe, generator: torch.Generator
) -> list[CurvePoint]:
    """Train the router in place with Adam, and return a curve. The loss is the binary cross-entropy between the sigmoid of each
    logit and the masses [T, E] of the fit tokens, divided by the largest one of the batch (as in MoEfication's released code).
    The curve has the errors of the layer, not this loss."""
    device = layer.experts.down_proj.device
    layer.experts.requires_grad_(False)
    optimizer = torch.optim.Adam(layer.gate.parameters(), lr=recipe.gate_lr, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
    curve: list[CurvePoint] = []
    for step, batch in batches(len(data.fit_inputs), recipe, generator):
        inputs, target = (source[batch].to(device, torch.float32) for source in (data.fit_inputs, masses))
        F.binary_cross_entropy_with_logits(layer.gate(inputs), target / target.max().clamp(min=1e-20)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        if is_report(step, recipe):
            fit = layer_error(layer, data.fit_inputs[batch], data.fit_targets[batch])
            curve.append(CurvePoint(step, fit, layer_error(layer, data.holdout_inputs, data.holdout_targets)))
    return curve
