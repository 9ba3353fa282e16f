"""Splits an FFN's neurons into experts. With weight one, all experts together are the FFN, for every partition.

Legend: D hidden_size, E experts, F moe_intermediate_size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.config import MoeLayerConfig
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer


def check_experts(num_experts: int, mlp: GatedMLP) -> None:
    """Raises ValueError if there are more experts than neurons."""
    if num_experts > mlp.gate_proj.out_features:
        raise ValueError(f"split.experts: is {num_experts}, the FFN has {mlp.gate_proj.out_features} neurons")


def contiguous_partition(intermediate_size: int, num_experts: int) -> Tensor:
    """Neuron numbers [E, ceil(size / E)]: equal ranges of neighbours. -1 pads the end."""
    size = -(-intermediate_size // num_experts)
    neurons = torch.arange(num_experts * size)
    return neurons.masked_fill(neurons >= intermediate_size, -1).view(num_experts, size)


def split_ffn(mlp: GatedMLP, partition: Tensor, layer: MoeLayerConfig, router: Mapping[str, Tensor]) -> ExpertLayer:
    """An ExpertLayer in fp32 on the FFN's device. Its expert e has the neurons partition[e]. router: the router's tensors by
    name, on any device; {}: no router.

    -1 means a neuron with zero weights. It adds nothing. It also stays zero in training, because both of its factors are zero.
    """
    device = mlp.gate_proj.weight.device
    with torch.device(device):
        expert_layer = ExpertLayer(mlp.gate_proj.in_features, layer)
    partition = partition.to(device)
    gate_proj, up_proj, down_rows = (
        _take(weight.float(), partition) for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.t())
    )
    with torch.no_grad():
        expert_layer.experts.gate_up_proj.copy_(torch.cat((gate_proj, up_proj), dim=1))
        expert_layer.experts.down_proj.copy_(down_rows.transpose(1, 2))
    expert_layer.gate.load_state_dict(router)
    return expert_layer


def _take(rows: Tensor, partition: Tensor) -> Tensor:
    """Rows [N, D], chosen by partition [E, F] -> [E, F, D]. A -1 gives a row of zeros."""
    padded = F.pad(rows, (0, 0, 0, 1))
    return padded[partition]  # -1 is the padded row
