"""Chooses the planes of nested weights: the scales, and integers that change the layer's output as little as possible.

Legend: N rows (outputs), K columns (inputs), P columns padded to whole groups, G = P / 32 groups.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.nested.weights import HIGHEST, LOWEST, SCALE_DTYPE, STEPS, low_rounded_down, rounded_down
from ladimo.model.quantization import GROUP

# The columns whose errors are added to the later columns in one product.
BLOCK = 64
# The rows that are rounded together. Those of a block of columns fit into a core's cache.
ROWS_AT_ONCE = 2048
# Scales are tried with these factors. Clipping the largest weights a little reduces the total error. The low plane could not
# correct a stronger clipping.
SHRINKS = (1.0, 0.95, 0.9)
# This share of its mean is added to the diagonal of the second moments, so that they can be inverted.
DAMPING = 0.01


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """How the columns of a matrix compensate for each other's rounding errors, from its inputs' second moments.

    order: the columns in the order in which they are rounded, [K]. Those with the largest inputs come first, because many
    others can still compensate for their errors. factor: the upper Cholesky factor of the inverse moments of the columns in
    this order, fp32 [K, K].
    """

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> "ErrorFeedback":
        """moments: the sum of x x^T over inputs x, [K, K]."""
        order = moments.diagonal().argsort(descending=True, stable=True)
        damped = moments[order][:, order].double()
        mean = damped.diagonal().mean().clamp(min=1e-12)
        damped = damped + torch.diag(torch.full((len(damped),), DAMPING * float(mean), dtype=torch.float64))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return cls(order, factor.float())

    @property
    def importance(self) -> Tensor:
        """How much of a column's squared error is left in the output when later columns have compensated for it: [K]."""
        left = torch.empty_like(self.factor[0])
        left[self.order] = self.factor.diagonal().square().reciprocal()
        return left


def choose_scales(weights: Tensor, importance: Tensor | None = None) -> Tensor:
    """Weights [N, K] -> scales [N, G] in `SCALE_DTYPE`. Of a few candidates, each group gets the one with the least squared
    error, of which each column counts by its importance [K]; None: all the same. A scale may be negative, so that a group's
    largest weight can become the lowest integer."""
    counts = torch.ones(weights.shape[1]) if importance is None else importance
    counts = _padded(counts[None]).unflatten(1, (-1, GROUP))
    groups = _padded(weights).unflatten(1, (-1, GROUP))
    limit = groups.abs().amax(dim=2, keepdim=True).clamp(min=1e-12)
    scales, best = torch.empty_like(limit), torch.full_like(limit, torch.inf)
    extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    ends = (limit / HIGHEST, torch.where(extreme > 0, -limit, limit) / -LOWEST)
    for end, shrink in product(ends, SHRINKS):
        scale = (end * shrink).to(SCALE_DTYPE).float()
        errors = ((groups / scale).round().clamp(LOWEST, HIGHEST) * scale - groups).square()
        error = (errors * counts).sum(dim=2, keepdim=True)
        scales = torch.where(error < best, scale, scales)
        best = torch.minimum(error, best)
    chosen: Tensor = scales.squeeze(2)
    return chosen.to(SCALE_DTYPE)


def round_nearest(weights: Tensor, scales: Tensor) -> Tensor:
    """The nearest integers int8 [N, P]."""
    groups: Tensor = _padded(weights).unflatten(1, (-1, GROUP)) / scales.float().unsqueeze(2)
    return groups.round().clamp(LOWEST, HIGHEST).flatten(1).to(torch.int8)


def choose_planes(weights: Tensor, scales: Tensor, feedback: ErrorFeedback, any_low: bool = False) -> tuple[Tensor, Tensor]:
    """The high and the low plane, int8 [N, P], for weights [N, K].

    Both are chosen by error feedback, the low plane for what the high plane leaves. An integer is always its number rounded
    down or up. So the low plane always reaches the weight. On SmolLM2 it was also more accurate than any integer
    (`loadtests/README.md`). any_low: an integer of the low plane may be any, which a checkpoint with whole weights cannot keep.
    """
    lowest = rounded_down(weights, scales)
    high = round_with_feedback(weights, scales, feedback, lowest, (lowest + 1).clamp(max=HIGHEST))
    left = weights.float() - (high * scales.float().repeat_interleave(GROUP, dim=1))[:, : weights.shape[1]]
    lowest = low_rounded_down(weights, high, scales)
    highest = (lowest + 1).clamp(max=HIGHEST)
    if any_low:
        lowest, highest = torch.full_like(lowest, LOWEST), torch.full_like(highest, HIGHEST)
    return high, round_with_feedback(left, scales.float() / STEPS, feedback, lowest, highest)


def round_with_feedback(weights: Tensor, scales: Tensor, feedback: ErrorFeedback, lowest: Tensor, highest: Tensor) -> Tensor:
    """Integers int8 [N, P] between lowest and highest [N, P], for weights [N, K], chosen column by column. The later columns
    compensate for the rounding error of a column. This is GPTQ (arXiv 2210.17323, algorithm 1).

    In the padding, integers are `lowest`, because no input multiplies them.
    """
    codes, order = lowest.clone(), feedback.order
    steps = scales.float().repeat_interleave(GROUP, dim=1)
    for rows in torch.arange(len(weights)).split(ROWS_AT_ONCE):
        left, step, low, high = (x[rows][:, order].float().t().contiguous() for x in (weights, steps, lowest, highest))
        codes[rows[:, None], order] = _round_columns(left, step, low, high, feedback.factor).t().to(torch.int8)
    return codes


def _round_columns(left: Tensor, steps: Tensor, lowest: Tensor, highest: Tensor, factor: Tensor) -> Tensor:
    """`round_with_feedback` for some rows and columns in their order: [K, N], so that a column's numbers are neighbours in
    memory. Overwrites `left`."""
    codes, cols = torch.empty_like(left), len(left)
    for begin in range(0, cols, BLOCK):
        end = min(begin + BLOCK, cols)
        errors = torch.empty(end - begin, left.shape[1])
        for column in range(begin, end):
            codes[column] = torch.clamp((left[column] / steps[column]).round(), lowest[column], highest[column])
            error = (left[column] - codes[column] * steps[column]) / factor[column, column]
            left[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
            errors[column - begin] = error
        left[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    return codes


def _padded(weights: Tensor) -> Tensor:
    return F.pad(weights.float(), (0, -weights.shape[1] % GROUP))
