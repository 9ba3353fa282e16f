"""Choosing the next token of every row at once. Legend: R rows, V vocabulary."""

import hashlib
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.request import Sequence


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """Per row: temperature (0 = greedy), top_p, top_k (0 = no limit), and one uniform number in [0, 1)."""

    temperature: Tensor  # [R] float32
    top_p: Tensor  # [R] float32
    top_k: Tensor  # [R] int64
    uniform: Tensor  # [R] float32


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but seed and position: what is drawn never depends on the batch."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def make_sampling_inputs(sequences: Rows[Sequence], device: torch.device) -> SamplingInputs | None:
    """The rows' parameters as tensors; None when every row is greedy, which needs no sorting."""
    params = [sequence.request.sampling for sequence in sequences]
    if all(p.temperature == 0 for p in params):
        return None
    return SamplingInputs(
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device),
        uniform=torch.tensor([uniform(s.seed, s.num_tokens) for s in sequences], dtype=torch.float32, device=device),
    )


def sample(logits: Tensor, inputs: SamplingInputs | None) -> Tensor:
    """Token ids [R] from logits [R, V]: temperature, then top-k, then top-p, then inversion of the cumulative distribution."""
    greedy = logits.argmax(dim=-1)
    if inputs is None:
        return greedy
    scaled = logits.float() / inputs.temperature.clamp(min=1e-5).unsqueeze(-1)
    probabilities, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    top_k = torch.where(inputs.top_k > 0, inputs.top_k, logits.shape[-1])
    probabilities = probabilities * (rank < top_k.unsqueeze(-1))
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities * ((before < inputs.top_p.unsqueeze(-1)) | (rank == 0))
    cumulative = probabilities.cumsum(dim=-1)
    threshold = inputs.uniform.unsqueeze(-1) * cumulative[:, -1:]
    # First place whose cumulative probability exceeds the threshold; rounding can never reach a dropped place.
    place = (cumulative <= threshold).sum(dim=-1, keepdim=True)
    last_kept = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    drawn = order.gather(-1, torch.minimum(place, last_kept)).squeeze(-1)
    return torch.where(inputs.temperature == 0, greedy, drawn)
