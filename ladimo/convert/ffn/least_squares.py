"""Closed-form repair of a pruned FFN: `down_proj` solved again for the neurons that stay.

Legend: T tokens, D hidden_size, N neurons, K kept neurons.
"""

import torch
from torch import Tensor

from ladimo.convert.ffn.hidden_channels import hidden_channels
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.model.layers import GatedMLP

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@torch.no_grad()
def solve_down(mlp: GatedMLP, kept: Tensor, data: LayerData, ridge: float) -> tuple[Tensor, float]:
    """Columns [D, K] for the neurons `kept` [K] with which they come closest to the FFN's outputs on the fit tokens, in fp32
    on the FFN's device, and the ridge that was used.

    This is least squares on the change of the columns, with a penalty of ridge * (the channel's power) on its squares: a
    large ridge leaves the columns as they are. A ridge of 0 stands for the one of RIDGES with the least error on the holdout.
    """
    kept = kept.to(mlp.down_proj.weight.device)
    original = mlp.down_proj.weight[:, kept].t().double()  # [K, D]
    power, missing = _moments(mlp, kept, original, data.fit_inputs, data.fit_targets)
    if ridge:
        return (original + _solve(power, missing, ridge)).t().float(), ridge
    changes = {candidate: _solve(power, missing, candidate) for candidate in RIDGES}
    # |missing output - h change|^2 over the holdout, without the part that is the same for all ridges
    held_power, held_missing = _moments(mlp, kept, original, data.holdout_inputs, data.holdout_targets)
    errors = {
        candidate: ((held_power @ change - 2 * held_missing) * change).sum().item() for candidate, change in changes.items()
    }
    best = min(errors, key=errors.__getitem__)
    return (original + changes[best]).t().float(), best


def _moments(mlp: GatedMLP, kept: Tensor, down: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Means over tokens of h h^T [K, K] and of h (y - down^T h)^T [K, D] in fp64."""
    power = down.new_zeros(len(kept), len(kept))
    missing = torch.zeros_like(down)
    start = 0
    for hidden in hidden_channels(mlp, inputs):
        h = hidden[:, kept].double()
        y = targets[start : start + len(h)].to(h)
        start += len(h)
        power += h.t() @ h
        missing += h.t() @ (y - h @ down)
    return power / len(inputs), missing / len(inputs)


def _solve(power: Tensor, missing: Tensor, ridge: float) -> Tensor:
    diagonal = power.diagonal()
    penalty = ridge * diagonal + 1e-12 * diagonal.mean().clamp(min=1e-30)  # the second for channels that never fire
    change: Tensor = torch.linalg.solve(power + penalty.diag(), missing)
    return change
