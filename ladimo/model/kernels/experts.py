"""Running the chosen experts. Reference: `ladimo.model.experts.apply_experts_grouped`.

One token needs matrix-vector products (`expert_matvec`). Their time is the time to read the weights of the chosen experts. More
tokens need two grouped matrix products over lists of tokens by expert (`expert_grouped`). They read the weights of an expert
once for every `m` tokens that chose it. In both forms, the block of an expert that no token chose returns at once. So the cost
depends on the routing, but the shapes do not.

The hidden activations of an expert are multiplied by the expert's weight, so the output is a plain sum. The experts of a token
are summed in fp32 in the order of their numbers, so the result does not depend on the rest of the batch. If a token takes all
experts of the layer, its output is one long product over all of them, which is the same work as the dense FFN.

Weights may be integers with scales. They are unpacked in registers as they are read; `ladimo.model.kernels.dequantize` explains
W, BITS and PARTS. They stay integers even for long prompts. Floating-point weights would multiply faster there, but all experts
of a layer would have to be unpacked, and a policy may use only a few.

Legend: T tokens, D hidden_size, F moe_intermediate_size, E experts, K places per token.
"""

import torch
from torch import Tensor

from ladimo.model.kernels.expert_grouped import DENSE_TOKENS, grouped
from ladimo.model.kernels.expert_matvec import matvec
from ladimo.model.kernels.tiles import Tile
from ladimo.model.quantization import Weights

# Longer inputs are computed in parts, because intermediate buffers have a place for every expert of every token.
MAX_TOKENS = 4096


def apply_experts(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    tiles: tuple[Tile, Tile] | None = None,
    dense_tokens: int = DENSE_TOKENS,
    max_tokens: int = MAX_TOKENS,
) -> Tensor:
    """Run the chosen experts, [T, D] -> [T, D]. See the reference. `tiles` replaces the default choice, which depends on the
    number of tokens."""
    num_tokens = hidden_states.shape[0]
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    for begin in range(0, num_tokens, max_tokens):
        part = slice(begin, begin + max_tokens)
        x, weights, ids = (tensor[part].contiguous() for tensor in (hidden_states, topk_weights, topk_ids))
        if num_tokens == 1:
            matvec(x, weights, ids, gate_up_proj, down_proj, out, tiles)
        else:
            grouped(x, weights, ids, gate_up_proj, down_proj, out[part], tiles, dense_tokens)
    return out
