"""Orders an FFN's neurons by importance, and repairs the FFN for each number of neurons that are kept.

The FFN is linear in its hidden channels h (`hidden_channels`): y = W h with W = down_proj. If the output has a bias, it
stays. So everything follows from one matrix, the second moments P = E[h h^T]. If only the channels K are kept, with new columns
V, the error is E|W h - V h_K|^2. The best columns are V = W P[:, K] P[K, K]^-1. The optimal brain surgeon removes the channel
whose loss after this repair is least: |W_c|^2 / (P^-1)_cc (Hassibi and Stork, 1993; for whole structures ZipLM, arXiv
2302.04089).

Legend: T tokens, D hidden_size, N neurons, K kept neurons, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ladimo.convert.ffn.hidden_channels import hidden_channels, second_moments
from ladimo.convert.ffn.layer_data import LayerData, target_variance
from ladimo.convert.progress import track
from ladimo.model.layers import Ffn

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # in units of each channel's own power
ROUNDS = 256  # the number of rounds in which neurons are removed; after each, the inverse is updated


@dataclass(frozen=True, slots=True)
class NeuronOrdering:
    """order: neurons [N], the most important first. repairs[n]: columns [D, K] of down_proj, solved again for the neurons of
    the first n experts. errors[n]: the squared error with these on the holdout, divided by the variance of the FFN's outputs.
    oracle_errors[n]: the same for an oracle that runs, for each token, the n experts with the largest outputs, without repair.
    ridge: the one that was used."""

    order: Tensor
    repairs: dict[int, Tensor]
    errors: dict[int, float]
    oracle_errors: dict[int, float]
    ridge: float


@torch.no_grad()
def order_neurons(mlp: Ffn, data: LayerData, num_experts: int, ridge: float = 0.0) -> NeuronOrdering:
    """The order, and repairs for n = 1 .. num_experts - 1 experts of equal width, of which the last is padded. ridge: how
    strongly repairs are pulled to the original columns, in units of each channel's own power. 0 means the one of RIDGES with
    the least error on the holdout with half of the experts."""
    down = mlp.down_proj.weight.double()
    fit, held = second_moments(mlp, data.fit_inputs), second_moments(mlp, data.holdout_inputs)
    variance = target_variance(data.holdout_targets) * down.shape[0]  # the variance of a whole output vector
    size = -(-down.shape[1] // num_experts)
    chosen = ridge
    if not ridge:
        kept = pruning_order(fit, down, RIDGES[1])[: max(1, num_experts // 2) * size]
        chosen = min(RIDGES, key=lambda ridge: repair_error(held, down, kept, repair(fit, down, kept, ridge)))
    order = pruning_order(fit, down, chosen)
    repairs, errors = {}, {}
    for count in range(1, num_experts):
        kept = order[: count * size]
        repaired = repair(fit, down, kept, chosen)
        repairs[count] = repaired.float().cpu()
        errors[count] = repair_error(held, down, kept, repaired) / variance
    oracle = {n: error / variance for n, error in _oracle_errors(mlp, data.holdout_inputs, order, num_experts).items()}
    return NeuronOrdering(order.cpu(), repairs, errors, oracle, chosen)


def pruning_order(power: Tensor, down: Tensor, ridge: float) -> Tensor:
    """Neurons [N], the most important first. power: second moments [N, N]. down: [D, N]."""
    neurons = power.shape[0]
    inverse = torch.linalg.inv(_damped(power, ridge))
    columns = down.clone()
    alive = torch.ones(neurons, dtype=torch.bool, device=power.device)
    removed: list[Tensor] = []
    at_once = max(1, neurons // ROUNDS)
    for start in track(range(0, neurons, at_once), "pruning rounds"):
        losses = (columns.square().sum(dim=0) / inverse.diagonal()).masked_fill(~alive, torch.inf)
        gone = losses.topk(min(at_once, neurons - start), largest=False).indices  # the least important first
        block = inverse[:, gone]
        change = torch.linalg.solve(block[gone], block.t())  # [gone, N]
        columns -= columns[:, gone] @ change
        inverse -= block @ change
        inverse[gone], inverse[:, gone], columns[:, gone] = 0.0, 0.0, 0.0  # without rounding errors
        inverse[gone, gone] = 1.0
        alive[gone] = False
        removed.append(gone)
    return torch.cat(removed).flip(0)


def repair(power: Tensor, down: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Columns [D, K] for the kept neurons, by least squares with a penalty on the change from down[:, kept]."""
    inner = power[kept][:, kept]
    missing = down @ power[:, kept] - down[:, kept] @ inner
    change: Tensor = torch.linalg.solve(_damped(inner, ridge), missing.t())
    return down[:, kept] + change.t()


def repair_error(power: Tensor, down: Tensor, kept: Tensor, repaired: Tensor) -> float:
    """E|down h - repaired h[kept]|^2, where `power` has the second moments of h."""
    difference = down.clone()
    difference[:, kept] -= repaired
    return ((difference @ power) * difference).sum().item()


def expert_neurons(order: Tensor, num_experts: int) -> Tensor:
    """The neurons in this order, cut into experts [E, ceil(N / E)]. -1 pads the last expert. This is an exact partition."""
    size = -(-len(order) // num_experts)
    padded = torch.full((num_experts * size,), -1, dtype=torch.int64)
    padded[: len(order)] = order
    return padded.view(num_experts, size)


def _damped(power: Tensor, ridge: float) -> Tensor:
    diagonal = power.diagonal()
    tiny = 1e-9 * diagonal.mean().clamp(min=1e-30)  # for channels that never fire
    return power + (ridge * diagonal + tiny).diag()


def _oracle_errors(mlp: Ffn, inputs: Tensor, order: Tensor, num_experts: int) -> dict[int, float]:
    """The mean squared error if each token runs only its n experts with the largest outputs, for n = 1 .. E - 1."""
    down = mlp.down_proj.weight.float()
    totals = torch.zeros(num_experts - 1, dtype=torch.float64)
    for hidden in hidden_channels(mlp, inputs):
        experts = [expert.to(down.device) for expert in order.split(-(-len(order) // num_experts))]
        outputs = torch.stack([hidden[:, neurons] @ down[:, neurons].t() for neurons in experts])  # [E, T, D]
        rank = outputs.square().sum(dim=2).argsort(dim=0, descending=True)  # [E, T]
        ordered = outputs.gather(0, rank.unsqueeze(2).expand_as(outputs))
        skipped = ordered.flip(0).cumsum(dim=0).flip(0)[1:]  # for n experts: the sum of the outputs of the others
        totals[: len(skipped)] += skipped.square().sum(dim=(1, 2)).double().cpu()
    return {n + 1: total / len(inputs) for n, total in enumerate(totals.tolist())}
