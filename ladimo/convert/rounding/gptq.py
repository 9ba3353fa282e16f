"""The high plane of nested weights: scales, and integers chosen so that the layer's output changes least.

Legend: N rows (outputs), K columns (inputs), P columns filled up to whole groups, G = P / 32 groups.
"""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.model.nested import HIGHEST, LOWEST, SCALE_DTYPE, rounded_down
from ladimo.model.quantization import GROUP

# Columns whose errors are pushed to the rest in one product.
BLOCK = 128
# Rows worked on at a time: an output head has many.
ROWS_AT_ONCE = 8192
# Clipping the largest weights a little leaves less error in all. More than this could not be made up for by the low plane.
SHRINKS = (1.0, 0.95, 0.9)
# The second moments' diagonal grows by this share of its mean, so that they can be inverted.
DAMPING = 0.01


def choose_scales(weights: Tensor) -> Tensor:
    """Weights [N, K] -> scales [N, G] in `SCALE_DTYPE`: of a few, the ones that leave the least squared error. A scale may be
    negative, so that a group's largest weight can be the lowest integer."""
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
    """Integers int8 [N, P] for weights [N, K], column by column; what a column's rounding does to the output is made up for in
    the columns that follow. moments: the inputs' second moments, the sum of x x^T [K, K], in fp32.

    GPTQ, arXiv 2210.17323, algorithm 1, but an integer is the weight rounded down or up and nothing else. On SmolLM2 that is
    also better than integers that may go anywhere (`docs/nested.md`), and the low plane always reaches the weight.
    """
    cols = weights.shape[1]
    factor = _inverse_factor(moments)
    parts = []
    for rows, row_scales in zip(weights.split(ROWS_AT_ONCE), scales.split(ROWS_AT_ONCE), strict=True):
        codes = round_nearest(rows, row_scales)  # of the padding, which no input meets
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
