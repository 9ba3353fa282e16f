"""Chooses the high plane of nested weights: the scales, and integers that change the layer's output as little as possible.

Legend: N rows (outputs), K columns (inputs), P columns padded to whole groups, G = P / 32 groups.
"""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.nested import HIGHEST, LOWEST, SCALE_DTYPE, rounded_down
from ladimo.model.quantization import GROUP

# The columns whose errors are added to the later columns in one product.
BLOCK = 128
# The rows that are rounded together. An output head has many rows.
ROWS_AT_ONCE = 8192
# Scales are tried with these factors. Clipping the largest weights a little reduces the total error. The low plane could not
# correct a stronger clipping.
SHRINKS = (1.0, 0.95, 0.9)
# This share of its mean is added to the diagonal of the second moments, so that they can be inverted.
DAMPING = 0.01


def choose_scales(weights: Tensor) -> Tensor:
    """Weights [N, K] -> scales [N, G] in `SCALE_DTYPE`. Of a few candidates, each group gets the one with the least squared
    error. A scale may be negative, so that a group's largest weight can become the lowest integer."""
    groups = _padded(weights).unflatten(1, (-1, GROUP))
    limit = groups.abs().amax(dim=2, keepdim=True).clamp(min=1e-12)
    scales, best = torch.empty_like(limit), torch.full_like(limit, torch.inf)
    extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    ends = (limit / HIGHEST, torch.where(extreme > 0, -limit, limit) / -LOWEST)
    for end, shrink in product(ends, SHRINKS):
        scale = (end * shrink).to(SCALE_DTYPE).float()
        error = ((groups / scale).round().clamp(LOWEST, HIGHEST) * scale - groups).square().sum(dim=2, keepdim=True)
        scales = torch.where(error < best, scale, scales)
        best = torch.minimum(error, best)
    chosen: Tensor = scales.squeeze(2)
    return chosen.to(SCALE_DTYPE)


def round_nearest(weights: Tensor, scales: Tensor) -> Tensor:
    """The nearest integers int8 [N, P]."""
    groups: Tensor = _padded(weights).unflatten(1, (-1, GROUP)) / scales.float().unsqueeze(2)
    return groups.round().clamp(LOWEST, HIGHEST).flatten(1).to(torch.int8)


def round_with_feedback(weights: Tensor, scales: Tensor, moments: Tensor) -> Tensor:
    """Integers int8 [N, P] for weights [N, K], chosen column by column. The later columns compensate for the rounding error of
    a column. moments: the second moments of the inputs, the sum of x x^T [K, K], in fp32.

    This is GPTQ (arXiv 2210.17323, algorithm 1) with one difference: an integer is always its weight rounded down or up. So the
    low plane always reaches the weight. On SmolLM2 it was also more accurate than any integer (`loadtests/README.md`).
    """
    cols = weights.shape[1]
    factor = _inverse_factor(moments)
    parts = []
    for rows, row_scales in zip(weights.split(ROWS_AT_ONCE), scales.split(ROWS_AT_ONCE), strict=True):
        codes = round_nearest(rows, row_scales)  # stays in the padding, which no input multiplies
        lowest = rounded_down(rows, row_scales).float()
        highest = (lowest + 1).clamp(max=HIGHEST)
        left, steps = rows.float().clone(), row_scales.float()
        for begin in range(0, cols, BLOCK):
            end = min(begin + BLOCK, cols)
            errors = torch.empty(len(rows), end - begin)
            for column in range(begin, end):
                step = steps[:, column // GROUP]
                code = torch.clamp((left[:, column] / step).round(), lowest[:, column], highest[:, column])
                codes[:, column] = code.to(torch.int8)
                error = (left[:, column] - code * step) / factor[column, column]
                left[:, column + 1 : end] -= error[:, None] * factor[column, column + 1 : end]
                errors[:, column - begin] = error
            left[:, end:] -= errors @ factor[begin:end, end:]
        parts.append(codes)
    return torch.cat(parts)


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse second moments [K, K]."""
    damped = moments.double()
    mean = damped.diagonal().mean().clamp(min=1e-12)
    damped = damped + torch.diag(torch.full((len(damped),), DAMPING * float(mean), dtype=torch.float64))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _padded(weights: Tensor) -> Tensor:
    return F.pad(weights.float(), (0, -weights.shape[1] % GROUP))
