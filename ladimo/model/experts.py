"""Running the chosen experts, in torch. There are three implementations; `apply_experts` picks one. All have one signature:

    (hidden_states [T, D], topk_weights [T, K], topk_ids [T, K], gate_up_proj [E, 2F, D], down_proj [E, D, F],
     up_bias [E, F] or None) -> [T, D]

With `up_bias`, the experts are parts of an FFN without a gate (`layers.GeluMLP`), and gate_up_proj [E, F, D] has up rows only.
Otherwise the gate rows come before the up rows, as in transformers. The id -1 means no expert, and its weight is 0.

The Triton kernels have the same signature but for `up_bias`, and one test compares all of them. `apply_experts` and the kernels
also take integer weights; `apply_experts` turns these into floating point first.

Legend: T tokens, K places per token, E experts, D hidden_size, F moe_intermediate_size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.quantization import Weights, as_tensor

# Copying the weights of the chosen experts is affordable for up to this many pairs of a token and a place.
MAX_GATHERED = 16


def apply_experts(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    up_bias: Tensor | None = None,
) -> Tensor:
    """Run the chosen experts with the implementation that fits the device.

    On a CPU tokens are grouped by expert, so only the weights of chosen experts are read, and not copied. On other devices the
    work must not synchronise with the host, so that a CUDA graph can capture a decode step.
    """
    gate_up_proj, down_proj = (as_tensor(weights, hidden_states.dtype) for weights in (gate_up_proj, down_proj))
    if hidden_states.device.type == "cpu":
        return apply_experts_grouped(hidden_states, topk_weights, topk_ids, gate_up_proj, down_proj, up_bias)
    if topk_ids.numel() <= MAX_GATHERED:
        return apply_experts_gathered(hidden_states, topk_weights, topk_ids, gate_up_proj, down_proj, up_bias)
    return apply_experts_masked(hidden_states, topk_weights, topk_ids, gate_up_proj, down_proj, up_bias)


def apply_experts_grouped(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None = None,
) -> Tensor:
    """Sort the tokens by expert and run one small dense FFN for each chosen expert. Synchronises with the host once.

    The outputs of a token's experts are always added in the order of expert numbers. The order does not depend on the batch.
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
        product = F.linear(hidden_states[tokens], gate_up_proj[expert])
        result = F.linear(hidden_channels(product, None if up_bias is None else up_bias[expert]), down_proj[expert])
        out.index_add_(0, tokens, result * flat_weights[places, None])
    return out


def apply_experts_gathered(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None = None,
) -> Tensor:
    """Copy the expert of each place, then multiply. A graph can capture it, but the copies are expensive for many tokens."""
    ids = topk_ids.clamp(min=0)
    product = torch.einsum("td,tkfd->tkf", hidden_states, gate_up_proj[ids])
    hidden = hidden_channels(product, None if up_bias is None else up_bias[ids])
    result = torch.einsum("tkf,tkdf->tkd", hidden, down_proj[ids])
    return (result * topk_weights.to(result.dtype).unsqueeze(-1)).sum(dim=1)


def apply_experts_masked(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None = None,
) -> Tensor:
    """Run every expert on every token, with weight 0 where it is not chosen. The reference. A graph can capture it at any
    size."""
    dense_weights = topk_weights.new_zeros(topk_ids.shape[0], gate_up_proj.shape[0])
    dense_weights.scatter_add_(1, topk_ids.clamp(min=0), topk_weights)
    product = torch.einsum("td,efd->etf", hidden_states, gate_up_proj)
    hidden = hidden_channels(product, None if up_bias is None else up_bias[:, None])
    hidden = hidden * dense_weights.to(hidden_states.dtype).t().unsqueeze(-1)
    return torch.einsum("etf,edf->td", hidden, down_proj)


def hidden_channels(product: Tensor, up_bias: Tensor | None) -> Tensor:
    """The hidden channels [..., F] from an expert's first product: [..., 2F], or [..., F] of experts without a gate."""
    if up_bias is not None:
        return F.gelu(product + up_bias, approximate="tanh")
    gate, up = product.chunk(2, dim=-1)
    return F.silu(gate) * up
