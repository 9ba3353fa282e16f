"""Running the chosen experts. Three implementations of one signature beside the kernels', compared by one test;
`apply_experts` chooses.

    (hidden_states [T, D], topk_weights [T, K], topk_ids [T, K], gate_up_proj [E, 2F, D], down_proj [E, D, F]) -> [T, D]

The kernels, and `apply_experts`, also take weights as integers; off the GPU these are made whole first.
An id of -1 is no expert; its weight is 0. Gate rows come before up rows, as in transformers. Legend: T tokens, K places,
E experts, D hidden_size, F moe_intermediate_size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.quantization import Weights, as_tensor

# Up to this many (token, place) pairs a copy of the chosen experts' weights is affordable.
MAX_GATHERED = 16


def apply_experts(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up_proj: Weights, down_proj: Weights
) -> Tensor:
    """On CPU group tokens by expert: only the chosen experts' weights are read, in place. On a device stay free of host
    synchronisation, so that a decode step can be captured: kernels on a GPU, else the forms below."""
    gate_up_proj, down_proj = (as_tensor(weights, hidden_states.dtype) for weights in (gate_up_proj, down_proj))
    if hidden_states.device.type == "cpu":
        return apply_experts_grouped(hidden_states, topk_weights, topk_ids, gate_up_proj, down_proj)
    if topk_ids.numel() <= MAX_GATHERED:
        return apply_experts_gathered(hidden_states, topk_weights, topk_ids, gate_up_proj, down_proj)
    return apply_experts_masked(hidden_states, topk_weights, topk_ids, gate_up_proj, down_proj)


def apply_experts_grouped(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """Tokens sorted by expert, one small dense FFN per expert hit. Synchronises with the host once.

    A token's experts are added in expert order whatever else is in the batch, so a request's numbers do not depend on its
    neighbours.
    """
    num_experts, num_places = gate_up_proj.shape[0], topk_ids.shape[1]
    flat_ids = topk_ids.flatten()
    order = flat_ids.argsort(stable=True)
    counts = torch.bincount(flat_ids + 1, minlength=num_experts + 1).tolist()
    out = torch.zeros_like(hidden_states)
    flat_weights = topk_weights.flatten().to(hidden_states.dtype)
    begin = counts[0]
    for expert, count in enumerate(counts[1:]):
        if count == 0:
            continue
        places = order[begin : begin + count]
        begin += count
        tokens = places // num_places
        gate, up = F.linear(hidden_states[tokens], gate_up_proj[expert]).chunk(2, dim=-1)
        result = F.linear(F.silu(gate) * up, down_proj[expert])
        out.index_add_(0, tokens, result * flat_weights[places, None])
    return out


def apply_experts_gathered(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """Copy each place's expert and multiply. Fit for capture; the copies make it dear for more than a few tokens."""
    ids = topk_ids.clamp(min=0)
    gate, up = torch.einsum("td,tkfd->tkf", hidden_states, gate_up_proj[ids]).chunk(2, dim=-1)
    result = torch.einsum("tkf,tkdf->tkd", F.silu(gate) * up, down_proj[ids])
    return (result * topk_weights.to(result.dtype).unsqueeze(-1)).sum(dim=1)


def apply_experts_masked(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """Every expert on every token, weighted by zero where not chosen. The reference, and fit for capture at any size."""
    dense_weights = topk_weights.new_zeros(topk_ids.shape[0], gate_up_proj.shape[0])
    dense_weights.scatter_add_(1, topk_ids.clamp(min=0), topk_weights)
    gate, up = torch.einsum("td,efd->etf", hidden_states, gate_up_proj).chunk(2, dim=-1)
    hidden = F.silu(gate) * up * dense_weights.to(hidden_states.dtype).t().unsqueeze(-1)
    return torch.einsum("etf,edf->td", hidden, down_proj)
