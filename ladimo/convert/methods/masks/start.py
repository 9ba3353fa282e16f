"""Masks before training, from statistics of the neurons. They stand in for most of the published schedule's tens of thousands
of steps.

The FFN's inputs are clustered, and a token's expert is its nearest cluster. A neuron matters to an expert as much as it adds to
the FFN's outputs for the tokens of the expert.

Legend: N experts, U neurons, T tokens, D hidden_size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.convert.ffn.clustering import balanced_kmeans
from ladimo.convert.ffn.hidden_channels import neuron_statistics
from ladimo.model.layers import Ffn

CLUSTER_TOKENS = 1024  # the exact balanced clustering of more would take long
SPREAD = 8.0  # the distance of the best neuron's logit from the worst one's


@dataclass(frozen=True, slots=True)
class Start:
    """order: how much each neuron matters to each expert, as its place from 0 (least) to 1: [N, U]. router: [N, D]; None for
    one expert."""

    order: Tensor
    router: Tensor | None


def find_start(mlp: Ffn, inputs: Tensor, experts: int, generator: torch.Generator) -> Start:
    """inputs: the FFN's [T, D], on the host."""
    if experts == 1:
        return Start(places(neuron_statistics(mlp, inputs).importance)[None], None)
    picked = inputs[torch.randperm(len(inputs), generator=generator)[:CLUSTER_TOKENS]].float()
    directions = F.normalize(picked, dim=1)
    members = F.one_hot(balanced_kmeans(directions, experts, generator), experts).float()
    centres = F.normalize(members.t() @ directions, dim=1)
    nearest = (inputs.float() @ centres.t()).argmax(dim=1)
    order = [
        places(neuron_statistics(mlp, own if len(own := inputs[nearest == expert]) else inputs).importance)
        for expert in range(experts)
    ]
    return Start(torch.stack(order), centres)


def places(importance: Tensor) -> Tensor:
    """Numbers [U] -> their places in rising order, from 0 to 1."""
    return importance.cpu().argsort().argsort() / max(1, len(importance) - 1)
