"""Routing of precision: which neurons and which words of a token are read at 8 bits, when the rest is read at 4.

The pass at 4 bits is computed anyway, and it is the router. No weights and no training are needed.

- FFN. A neuron's score is the magnitude of its hidden channel at 4 bits times the norm of its column in down_proj: how much it
  adds to the output. A neuron whose score is at least REFINE times the token's mean score is read at 8 bits, in all matrices.
- Output head. A word whose logit at 4 bits is at most REFINE below the token's best logit is read at 8 bits.

So the experts of a nested layer are the low planes of single neurons. Counters have them in `REFINED_GROUPS` groups per layer.

Legend: T tokens, D hidden_size, E experts, F moe_intermediate_size, V vocabulary, G = REFINED_GROUPS.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.experts import hidden_channels
from ladimo.model.nested.weights import NestedWeights
from ladimo.model.precision import REFINED_GROUPS


class Part(NamedTuple):
    """Which neurons of every expert a process has: part `rank` of `size` equal ones. `add_up` replaces a tensor by the sum over
    all parts, in place."""

    rank: int
    size: int
    add_up: Callable[[Tensor], None]


WHOLE = Part(0, 1, lambda _: None)


def column_norms(down: Tensor) -> Tensor:
    """down_proj [E, D, F] -> the norms of its columns, fp32 [E, F]."""
    norms: Tensor = down.float().norm(dim=-2)
    return norms


def apply_refined(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: NestedWeights,
    down: NestedWeights,
    norms: Tensor,
    refine: Tensor,
    up_bias: Tensor | None = None,
    part: Part = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Like `refine_neurons`, but returns the refined neurons as counts [T, G] int64, those of all parts."""
    out, refined = refine_neurons(hidden_states, topk_weights, topk_ids, gate_up, down, norms, refine, up_bias, part)
    everywhere = refined.new_zeros(*refined.shape[:2], part.size, refined.shape[2])
    everywhere[:, :, part.rank] = refined
    counts = count_refined(everywhere.flatten(1))
    part.add_up(counts)
    return out, counts


def refine_neurons(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: NestedWeights,
    down: NestedWeights,
    norms: Tensor,
    refine: Tensor,
    up_bias: Tensor | None = None,
    part: Part = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Run the chosen experts at 4 bits, and the neurons that matter to a token at 8. The reference; a graph can capture it.

    hidden_states [T, D], topk_weights and topk_ids [T, K], gate_up [E, 2F, D], down [E, D, F], norms [E, F], refine [T].
    up_bias [E, F]: of experts without a gate, whose gate_up [E, F, D] has up rows only.
    Returns the output [T, D] and whether each neuron is refined, bool [T, E, F]. With a part of the neurons, both are those of
    the part, and the mean score is that of all parts.
    """
    dtype, num_experts = hidden_states.dtype, gate_up.shape[0]
    chosen = topk_weights.new_zeros(len(topk_ids), num_experts)
    weights = chosen.scatter_add(1, topk_ids.clamp(min=0), topk_weights).to(dtype)
    runs = chosen.scatter_add(1, topk_ids.clamp(min=0), (topk_ids >= 0).to(chosen.dtype)) > 0  # [T, E]

    def hidden(bits: float) -> Tensor:
        return hidden_channels(torch.einsum("td,efd->tef", hidden_states, gate_up.at(bits, dtype)), up_bias)

    at4, at8 = hidden(4), hidden(8)
    scores = at4.float().abs() * norms * runs.unsqueeze(-1)
    count = (runs.sum(dim=-1) * at4.shape[-1] * part.size).clamp(min=1)
    total = scores.sum(dim=(1, 2))
    part.add_up(total)
    least = refine * total / count
    refined = (scores >= least[:, None, None]) & runs.unsqueeze(-1)
    inner = torch.where(refined, at8, at4) * weights.unsqueeze(-1)
    rest = down.at(8, dtype) - down.at(4, dtype)
    out = torch.einsum("tef,edf->td", inner, down.at(4, dtype)) + torch.einsum("tef,edf->td", inner * refined, rest)
    return out, refined


def refine_logits(
    normed: Tensor, logits: Tensor, head: NestedWeights, refine: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Like `refine_words`, but returns the refined words as counts [T, G] int64."""
    out, refined = refine_words(normed, logits, head, refine, bias)
    return out, count_refined(refined)


def refine_words(
    normed: Tensor, logits: Tensor, head: NestedWeights, refine: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Read the likely words again. normed [T, D], logits [T, V] at 4 bits, refine [T], bias [V]. Returns logits [T, V] and
    whether each word is refined, bool [T, V]."""
    refined = logits >= (logits.amax(dim=-1).float() - refine).unsqueeze(-1)
    return torch.where(refined, F.linear(normed, head.at(8, normed.dtype), bias), logits), refined


def count_refined(refined: Tensor) -> Tensor:
    """Booleans [T, N] -> how many of each group [T, G] int64. Number n belongs to group n * G // N."""
    groups = torch.arange(refined.shape[1], device=refined.device) * REFINED_GROUPS // refined.shape[1]
    counts = torch.zeros(len(refined), REFINED_GROUPS, dtype=torch.int64, device=refined.device)
    return counts.index_add_(1, groups, refined.to(torch.int64))
