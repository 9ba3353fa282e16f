"""The draw of the next token, for all rows at once. Legend: R rows, V vocabulary.

A row's token depends on its logits, its parameters and one uniform number, and on nothing else. The steps are temperature,
top-k, min-p, top-p, and then inversion of the cumulative distribution in the order of the vocabulary. `sample` defines this in
operations that a CUDA graph can capture. On a CPU `NativeDraw` computes the same in compiled code.
"""

import hashlib
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.request import SamplingParams, Sequence
from server.engine.transfers import to_device


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """The parameters of each row: temperature (0 = greedy), top_p, top_k (0 = no limit), min_p, a uniform number in [0, 1).

    `cuts` False promises that no row has a limit, so nothing has to be sorted. It never changes a row's token.
    """

    temperature: Tensor  # [R] float64
    top_p: Tensor  # [R] float64
    top_k: Tensor  # [R] int64
    min_p: Tensor  # [R] float64
    uniform: Tensor  # [R] float64
    cuts: bool = True


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends only on seed and position. So a draw never depends on the batch."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def cuts(params: SamplingParams) -> bool:
    """Whether the parameters exclude tokens from the draw (top-k, top-p or min-p)."""
    return params.temperature > 0 and (params.top_p < 1 or params.top_k > 0 or params.min_p > 0)


def make_sampling_inputs(sequences: Rows[Sequence], device: torch.device) -> SamplingInputs | None:
    """The rows' parameters as tensors on `device`; None if every row is greedy."""
    params = [sequence.request.sampling for sequence in sequences]
    if all(p.temperature == 0 for p in params):
        return None
    uniforms = [uniform(s.seed, s.num_tokens) for s in sequences]
    columns = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params], uniforms]
    temperature, top_p, min_p, numbers = to_device(columns, torch.float64, device).unbind()
    top_k = to_device([p.top_k for p in params], torch.int64, device)
    return SamplingInputs(temperature, top_p, top_k, min_p, numbers, any(map(cuts, params)))


def sample(logits: Tensor, inputs: SamplingInputs | None) -> Tensor:
    """Token ids [R] from logits [R, V]. `inputs` None: every row is greedy."""
    greedy = logits.argmax(dim=-1)
    if inputs is None:
        return greedy
    logits = logits.float()
    largest = logits.amax(dim=-1, keepdim=True)
    temperature = inputs.temperature.float().clamp(min=1e-5).unsqueeze(-1)
    weights = ((logits - largest) / temperature).exp()
    if inputs.cuts:
        weights = weights * _kept(logits, temperature, inputs)
    # Double precision, so that the order in which a device adds does not change the token.
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    threshold = inputs.uniform.unsqueeze(-1) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    # Rounding may point at an excluded token. Then take the most likely token instead.
    drawn = torch.where(weights.gather(-1, place) > 0, place, greedy.unsqueeze(-1)).squeeze(-1)
    return torch.where(inputs.temperature == 0, greedy, drawn)


def _kept(logits: Tensor, temperature: Tensor, inputs: SamplingInputs) -> Tensor:
    """A mask [R, V] of the tokens within the limits: the largest logits of each row. Ties go to the first in the vocabulary."""
    ordered = logits.sort(dim=-1, descending=True).values
    weights = ((ordered - ordered[:, :1]) / temperature).exp()
    rank = torch.arange(logits.shape[-1], device=logits.device)
    top_k, top_p = inputs.top_k.unsqueeze(-1), inputs.top_p.unsqueeze(-1)
    likely = ((top_k == 0) | (rank < top_k)) & (weights >= inputs.min_p.float().unsqueeze(-1))
    weights = (weights * likely).double()
    before = weights.cumsum(dim=-1) - weights
    nucleus = (top_p >= 1) | (before < top_p * weights.sum(dim=-1, keepdim=True))
    count = (likely & nucleus).sum(dim=-1, keepdim=True).clamp(min=1)
    bound = ordered.gather(-1, count - 1)
    ties = count - (ordered > bound).sum(dim=-1, keepdim=True)
    equal = logits == bound
    return (logits > bound) | (equal & (equal.cumsum(dim=-1) <= ties))
