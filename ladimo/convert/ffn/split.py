"""Splits an FFN's neurons into experts. With weight one, all experts together are the FFN, for every partition.

Legend: D hidden_size, E experts, F moe_intermediate_size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.config import MoeLayerConfig
from ladimo.model.layers import Ffn, GeluMLP
from ladimo.model.moe import ExpertLayer


def check_experts(num_experts: int, mlp: Ffn) -> None:
    """Raises ValueError if there are more experts than neurons."""
    if num_experts > mlp.up_proj.out_features:
        raise ValueError(f"split.experts: is {num_experts}, the FFN has {mlp.up_proj.out_features} neurons")


def contiguous_partition(intermediate_size: int, num_experts: int) -> Tensor:
    """Neuron numbers [E, ceil(size / E)]: equal ranges of neighbours. -1 pads the end."""
    size = -(-intermediate_size // num_experts)
    neurons = torch.arange(num_experts * size)
    return neurons.masked_fill(neurons >= intermediate_size, -1).view(num_experts, size)


def split_ffn(mlp: Ffn, partition: Tensor, layer: MoeLayerConfig, router: Mapping[str, Tensor]) -> ExpertLayer:
    """An ExpertLayer in fp32 on the FFN's device. Its expert e has the neurons partition[e]. router: the router's tensors by
    name, on any device; {}: no router.

    -1 means a neuron with zero weights. It adds nothing. It also stays zero in training, because its channel and its column in
    down_proj are zero.
    """
    device = mlp.up_proj.weight.device
    assert layer.ffn_kind == mlp.kind
    with torch.device(device):
        expert_layer = ExpertLayer(mlp.up_proj.in_features, layer)
    partition = partition.to(device)
    first = (mlp.up_proj,) if isinstance(mlp, GeluMLP) else (mlp.gate_proj, mlp.up_proj)
    rows = torch.cat([_take(projection.weight.float(), partition) for projection in first], dim=1)
    experts = expert_layer.experts
    with torch.no_grad():
        experts.gate_up_proj.copy_(rows)
        experts.down_proj.copy_(_take(mlp.down_proj.weight.t().float(), partition).transpose(1, 2))
        if isinstance(mlp, GeluMLP):
            assert experts.up_bias is not None and expert_layer.output_bias is not None
            experts.up_bias.copy_(_take(mlp.up_proj.bias[:, None].float(), partition)[..., 0])
            expert_layer.output_bias.copy_(mlp.down_proj.bias)
    expert_layer.gate.load_state_dict(router)
    return expert_layer


def _take(rows: Tensor, partition: Tensor) -> Tensor:
    """Rows [N, D], chosen by partition [E, F] -> [E, F, D]. A -1 gives a row of zeros."""
    padded = F.pad(rows, (0, 0, 0, 1))
    return padded[partition]  # -1 is the padded row
