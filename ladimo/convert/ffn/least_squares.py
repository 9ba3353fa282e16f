"""Repairs a pruned FFN in closed form: `down_proj` is solved again for the neurons that stay.

Legend: T tokens, D hidden_size, N neurons, K kept neurons.
"""

import torch
from torch import Tensor

from ladimo.convert.ffn.hidden_channels import hidden_channels
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.model.layers import Ffn

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@torch.no_grad()
def solve_down(mlp: Ffn, kept: Tensor, data: LayerData, ridge: float) -> tuple[Tensor, float]:
    """New columns [D, K] of `down_proj` for the neurons `kept` [K], in fp32 on the FFN's device, and the ridge that was used.

    With these columns, the kept neurons come closest to the FFN's outputs on the fit tokens. This is least squares on the
    change of the columns. The penalty on squared changes is ridge * (the channel's power), so a large ridge changes little. A
    ridge of 0 means the one of RIDGES with the least error on the holdout.
    """
    kept = kept.to(mlp.down_proj.weight.device)
    original = mlp.down_proj.weight[:, kept].t().double()  # [K, D]
    power, missing = _moments(mlp, kept, original, data.fit_inputs, data.fit_targets)
    if ridge:
        return (original + _solve(power, missing, ridge)).t().float(), ridge
    changes = {candidate: _solve(power, missing, candidate) for candidate in RIDGES}
    # |missing output - h change|^2 on the holdout, without the part that is equal for all ridges
    held_power, held_missing = _moments(mlp, kept, original, data.holdout_inputs, data.holdout_targets)
    errors = {
        candidate: ((held_power @ change - 2 * held_missing) * change).sum().item() for candidate, change in changes.items()
    }
    best = min(errors, key=errors.__getitem__)
    return (original + changes[best]).t().float(), best


def _moments(mlp: Ffn, kept: Tensor, down: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Means over tokens of h h^T [K, K] and of h (y - down^T h)^T [K, D] in fp64."""
    power = down.new_zeros(len(kept), len(kept))
    missing = torch.zeros_like(down)
    start = 0
    for hidden in hidden_channels(mlp, inputs):
        h = hidden[:, kept].double()
        y = targets[start : start + len(h)].to(h)
        if mlp.down_proj.bias is not None:  # stays as it is
            y = y - mlp.down_proj.bias.to(h)
        start += len(h)
        power += h.t() @ h
        missing += h.t() @ (y - h @ down)
    return power / len(inputs), missing / len(inputs)


def _solve(power: Tensor, missing: Tensor, ridge: float) -> Tensor:
    diagonal = power.diagonal()
    penalty = ridge * diagonal + 1e-12 * diagonal.mean().clamp(min=1e-30)  # the second part is for channels that never fire
    change: Tensor = torch.linalg.solve(power + penalty.diag(), missing)
    return change
