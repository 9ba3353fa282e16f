"""Substitutes: the experts that a budget of method elastic runs in place of the exact ones, and the layers with them.

Legend: N neurons, D hidden_size, E experts, F moe_intermediate_size, n experts of a substitute.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ladimo.convert.distill.layerwise import distill_layer
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.ffn.neuron_ordering import expert_neurons
from ladimo.convert.ffn.split import check_experts, contiguous_partition, split_ffn
from ladimo.convert.recipe import Recipe
from ladimo.model.config import MoeLayerConfig
from ladimo.model.layers import FFNS, Ffn, GeluMLP
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule

# A set of substitutes: the tensors of `Experts` for n experts, and if they are routed, also gate [n, D]. The bias of the output
# is not among them. It belongs to the layer, so it stays as it is in the dense FFN.
Weights = dict[str, Tensor]


def with_substitutes(
    mlp: Ffn, order: Tensor, num_experts: int, fixed: Sequence[Weights], routed: Sequence[Weights] = ()
) -> ExpertLayer:
    """An expert layer in fp32 on the FFN's device. It has the exact partition of the FFN in this order [N], then the sets of
    fixed substitutes, then the routed ones. Only the routed ones have a router."""
    partition = expert_neurons(order, num_experts)
    whole = fixed_layer(num_experts, partition.shape[1], mlp)
    exact = split_ffn(mlp, partition, whole, {})
    sets = [*fixed, *routed]
    if not sets:
        return exact
    count, scored = (sum(len(weights["down_proj"]) for weights in some) for some in (sets, routed))
    config = dataclasses.replace(whole, num_experts=num_experts + count, substitutes=count)
    if routed:
        config = dataclasses.replace(
            config,
            router="linear",
            score_function="sigmoid",
            expert_weight="score",
            fixed_experts=config.num_experts - scored,
        )
    with torch.device("meta"):
        layer = ExpertLayer(mlp.up_proj.in_features, config)
    device = mlp.up_proj.weight.device
    for name, own in exact.experts.state_dict().items():
        stacked = torch.cat([own, *(weights[name].to(device).float() for weights in sets)])
        layer.experts.register_parameter(name, nn.Parameter(stacked))
    layer.output_bias = exact.output_bias
    if routed:
        gate = torch.cat([weights["gate"].to(device).float() for weights in routed])
        layer.gate.load_state_dict({"weight": gate}, assign=True)
    return layer.requires_grad_(False)


def fixed_layer(count: int, size: int, mlp: Ffn) -> MoeLayerConfig:
    """A layer of `count` experts of an FFN that run for every token, with `size` neurons each."""
    return MoeLayerConfig(count, count, size, expert_weight="one", router="none", ffn_kind=mlp.kind)


def solved_substitute(mlp: Ffn, order: Tensor, num_experts: int, count: int, repaired: Tensor) -> Weights:
    """The first `count` experts with down_proj `repaired` [D, K], in fp32 on the host."""
    partition = expert_neurons(order, num_experts)[:count]
    part = split_ffn(mlp, partition, fixed_layer(count, partition.shape[1], mlp), {}).experts
    columns = torch.zeros(repaired.shape[0], partition.numel())
    columns[:, : repaired.shape[1]] = repaired  # only the last of all experts is padded, and no repair includes it
    down = columns.view(len(columns), count, -1).transpose(0, 1)
    return {name: weight.cpu() for name, weight in part.state_dict().items()} | {"down_proj": down.contiguous()}


def routed_counts(num_experts: int) -> tuple[int, ...]:
    """The numbers of experts per token for which routed substitutes are trained. One is too few, because its score would be
    divided by itself, and the router would learn nothing. With more than half of the experts, fixed ones are as good."""
    return tuple(range(2, num_experts // 2 + 1))


def routed_layer(mlp: Ffn, num_experts: int, count: int) -> ExpertLayer:
    """An FFN, split into routed experts of which `count` run per token, in fp32 on its device. The router has zero weights."""
    partition = contiguous_partition(mlp.up_proj.out_features, num_experts)
    layer = MoeLayerConfig(num_experts, count, partition.shape[1], score_function="sigmoid", ffn_kind=mlp.kind)
    return split_ffn(mlp, partition, layer, {"weight": torch.zeros(num_experts, mlp.up_proj.in_features)})


def routed_substitute(mlp: Ffn, data: LayerData, recipe: Recipe, steps: int, generator: torch.Generator) -> Weights:
    """Routed experts, trained by regression on the FFN's outputs, in fp32 on the host. Each step draws how many experts run per
    token, so that the result suits all budgets. Raises ValueError if there are more experts than neurons or the training
    diverges."""
    check_experts(recipe.split.experts, mlp)
    counts = routed_counts(recipe.split.experts)
    layer = routed_layer(mlp, recipe.split.experts, counts[0])
    gate = torch.randn(recipe.split.experts, mlp.up_proj.in_features, generator=generator) * recipe.split.gate_std
    layer.gate.load_state_dict({"weight": gate})
    train = dataclasses.replace(recipe.train, steps=steps)
    distill_layer(keep_output_bias(layer), data, train, generator, [LayerRule(count) for count in counts])
    return weights_of(layer)


def weights_of(layer: ExpertLayer) -> Weights:
    """The weights of routed experts, on the host."""
    weights = {**layer.experts.state_dict(), "gate": layer.gate.state_dict()["weight"]}
    return {name: tensor.detach().cpu() for name, tensor in weights.items()}


def keep_output_bias(layer: ExpertLayer) -> ExpertLayer:
    """The layer, whose output bias will not be trained: all substitutes of a layer share it."""
    if layer.output_bias is not None:
        layer.output_bias.requires_grad_(False)
    return layer


def as_ffn(weights: Weights, dense: Ffn) -> Ffn:
    """Fixed substitutes of the FFN `dense` as one narrow FFN, in fp32 on the host."""
    rows, down = weights["gate_up_proj"], weights["down_proj"].transpose(0, 1).flatten(1)
    parts = {"down_proj.weight": down}
    if isinstance(dense, GeluMLP):
        parts |= {"up_proj.weight": rows.flatten(0, 1), "up_proj.bias": weights["up_bias"].flatten()}
        parts |= {"down_proj.bias": dense.down_proj.bias.detach().float().cpu()}
    else:
        gate, up = rows.chunk(2, dim=1)  # [n, F, D]
        parts |= {"gate_proj.weight": gate.flatten(0, 1), "up_proj.weight": up.flatten(0, 1)}
    mlp = FFNS[dense.kind](*down.shape)
    mlp.load_state_dict({name: weight.clone() for name, weight in parts.items()})
    return mlp


def as_experts(mlp: Ffn, count: int) -> Weights:
    """A narrow FFN as `count` experts on the host: the inverse of `as_ffn`."""
    partition = contiguous_partition(mlp.up_proj.out_features, count)
    experts = split_ffn(mlp, partition, fixed_layer(count, partition.shape[1], mlp), {}).experts
    return {name: weight.cpu() for name, weight in experts.state_dict().items()}
