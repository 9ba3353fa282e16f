"""Calls of the kernels for nested weights, to be timed: a square linear layer and a whole FFN, all tokens wanting the same."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ladimo.model.nested.plane_layout import DownWeights, to_neuron_rows, to_words
from ladimo.model.nested.refinement import column_norms
from ladimo.model.nested.weights import NestedWeights
from ladimo.model.precision import NESTED_BITS, bytes_per_weight
from ladimo.prefill.random_weights import random_planes

# Bits and REFINE by what a token wants.
KINDS = {"4 bits": (4.0, torch.inf), "8 bits": (8.0, torch.inf), "whole": (torch.inf, torch.inf), "refined": (4.0, 1.5)}


@dataclass(frozen=True)
class NestedCalls:
    """The same call on several copies of the weights, and what it needs at least."""

    kernel: str
    case: str
    calls: list[Callable[[], object]]
    bytes_moved: float
    operations: float


def nested_calls(x: Tensor, inner: int, copies: int, kind: str) -> Iterator[NestedCalls]:
    """x [T, D], inner: the neurons of the FFN. Triton must be installed."""
    from ladimo.model.kernels.nested import experts as nested_experts
    from ladimo.model.kernels.nested import linear as nested_linear

    num_tokens, hidden = x.shape
    bits, refine = (torch.full((num_tokens,), value, device=x.device) for value in KINDS[kind])
    per_weight = bytes_per_weight(None if KINDS[kind][0] > max(NESTED_BITS) else int(KINDS[kind][0]))
    case = f"T {num_tokens}, {kind}"
    squares = [_weights(x, hidden, hidden) for _ in range(4 * copies)]
    calls: list[Callable[[], object]] = [partial(nested_linear.linear, x, one, bits) for one in squares]
    yield NestedCalls("nested linear", case, calls, hidden * hidden * per_weight, 2 * hidden * hidden * num_tokens)

    gate_ups = [_weights(x, 1, 2 * inner, hidden) for _ in range(copies)]
    downs = [
        DownWeights(one.full, one.high, one.low, to_neuron_rows(one.low))
        for one in (_weights(x, 1, hidden, inner) for _ in range(copies))
    ]
    route = torch.ones(num_tokens, 1, device=x.device), torch.zeros(num_tokens, 1, device=x.device, dtype=torch.int64)
    rest = column_norms(downs[0].at(torch.inf, torch.float32)), bits, refine
    ffns = [partial(nested_experts.apply_nested, x, *route, *pair, *rest) for pair in zip(gate_ups, downs, strict=True)]
    counts = ffns[0]()[1].sum(dim=1).float()
    union = min(1.0, float(counts.mean()) / inner * num_tokens)  # of the neurons that any token refines, at most
    moved = 3 * hidden * inner * (per_weight + union * bytes_per_weight(NESTED_BITS[0]))
    case += f", {float(counts.mean()) / inner:.0%} refined" if kind == "refined" else ""
    yield NestedCalls("nested FFN", case, [*ffns], moved, 6 * hidden * inner * num_tokens)


def _weights(x: Tensor, *shape: int) -> NestedWeights:
    full = torch.randn(shape, dtype=x.dtype, device=x.device) * shape[-1] ** -0.5
    high, low = random_planes(*shape, device=x.device, scale=shape[-1] ** -0.5)
    return NestedWeights(full, to_words(high), to_words(low))
