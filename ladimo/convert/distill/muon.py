"""Muon: an optimizer whose steps are orthogonal matrices (K. Jordan and others, 2024, kellerjordan.github.io/posts/muon).

torch.optim.Muon is not used, because it does not take stacks of experts, and because it computes in bf16, which most CPUs
emulate.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ITERATIONS = 3  # here as good as the usual five
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic polynomial that enlarges small singular values fastest


class Muon(torch.optim.Optimizer):
    """A step is the orthogonalised Nesterov momentum. The last two dimensions of parameters [..., R, C] are matrices.

    lr: the spectral norm of a step if C >= R. For taller matrices it is multiplied by sqrt(R / C), so that one value suits any
    width (Yang, Simon and Bernstein, arXiv 2310.17813).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum: Tensor = state["momentum"]
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                rows, columns = weight.shape[-2:]
                direction = orthogonalized(weight.grad.lerp(momentum, MOMENTUM))
                weight.sub_(direction, alpha=group["lr"] * math.sqrt(max(1.0, rows / columns)))


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices [..., R, C] with singular values between 0.7 and 1.2, except very small ones, by Newton-Schulz iteration."""
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    found: Tensor = wide.mT if matrices.shape[-2] > matrices.shape[-1] else wide
    return found
