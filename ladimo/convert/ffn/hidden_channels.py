"""Statistics of an FFN's hidden channels on calibration inputs.

Legend: T tokens, D hidden_size, N neurons (intermediate_size).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.layers import Ffn, GeluMLP

CHUNK_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class NeuronStatistics:
    """Statistics of each hidden channel h over calibration tokens, [N] fp32 on the FFN's device. With a gate, h is
    silu(gate x) * up x."""

    mean: Tensor  # E[h]
    magnitude: Tensor  # E[|h|]
    importance: Tensor  # E[h^2] * |down column|^2: the mean square of the channel's contribution to the output


def hidden_channels(mlp: Ffn, inputs: Tensor, normalize: bool = False, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[Tensor]:
    """Yield h for inputs [T, D], in chunks [t, N] of at most `chunk_tokens` tokens, in fp32 on the FFN's device. normalize:
    scale inputs and weight rows to length one, which makes channels comparable (as in CMoE's released code)."""
    if isinstance(mlp, GeluMLP):
        assert not normalize
        weight, bias = mlp.up_proj.weight.float(), mlp.up_proj.bias.float()
        for chunk in inputs.split(chunk_tokens):
            yield F.gelu(F.linear(chunk.to(weight.device, torch.float32), weight, bias), approximate="tanh")
        return
    weights = [projection.weight.float() for projection in (mlp.gate_proj, mlp.up_proj)]
    if normalize:
        weights = [F.normalize(weight, dim=1) for weight in weights]
    for chunk in inputs.split(chunk_tokens):
        x = chunk.to(weights[0].device, torch.float32)
        gate, up = (F.linear(F.normalize(x, dim=1) if normalize else x, weight) for weight in weights)
        yield F.silu(gate) * up


@torch.no_grad()
def neuron_statistics(mlp: Ffn, inputs: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> NeuronStatistics:
    """Statistics over the FFN's inputs [T, D], chunk by chunk."""
    sums = torch.zeros(3, mlp.up_proj.out_features, dtype=torch.float64, device=mlp.up_proj.weight.device)
    for hidden in hidden_channels(mlp, inputs, chunk_tokens=chunk_tokens):
        sums += torch.stack((hidden.sum(dim=0), hidden.abs().sum(dim=0), hidden.pow(2).sum(dim=0)))
    mean, magnitude, square = (sums / len(inputs)).float()
    return NeuronStatistics(mean, magnitude, square * mlp.down_proj.weight.float().pow(2).sum(dim=0))


@torch.no_grad()
def coactivation(mlp: Ffn, inputs: Tensor, top: int) -> Tensor:
    """Counts [N, N] in fp32: for how many tokens two channels are both among the `top` largest by normalised magnitude. The
    diagonal counts each channel alone. CMoE clusters 0/1 columns (arXiv 2502.04416, K_a = `top`). Their L1 distances follow
    from these counts alone."""
    num_neurons = mlp.up_proj.out_features
    counts = torch.zeros(num_neurons, num_neurons, device=mlp.up_proj.weight.device)
    for hidden in hidden_channels(mlp, inputs, normalize=True):
        markers = torch.zeros_like(hidden)
        markers.scatter_(1, hidden.abs().topk(min(top, num_neurons), dim=1).indices, 1.0)
        counts += markers.t() @ markers
    return counts


def second_moments(mlp: Ffn, inputs: Tensor) -> Tensor:
    """E[h h^T] [N, N] over inputs [T, D], in fp64 on the FFN's device."""
    size = mlp.up_proj.out_features
    total = torch.zeros(size, size, dtype=torch.float64, device=mlp.up_proj.weight.device)
    for hidden in hidden_channels(mlp, inputs):
        total += hidden.t() @ hidden
    return total / len(inputs)
