"""Muon against what defines it: orthogonal steps, each matrix of a stack on its own, whatever the size of the gradients."""

import pytest
import torch
from torch import nn

from ladimo.convert.distill.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (8, 64), (3, 2, 30, 50)])
def test_singular_values_come_near_one_and_the_singular_vectors_stay(shape: tuple[int, ...]) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    spread = torch.linspace(1.0, 0.3, u.shape[-1])
    matrices = u @ spread.diag() @ vh
    found = orthogonalized(matrices)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.25
    turned = u.mT @ found @ vh.mT
    torch.testing.assert_close(turned, torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1)), rtol=0.0, atol=1e-3)
    torch.testing.assert_close(orthogonalized(1e6 * matrices), found, rtol=1e-3, atol=1e-3)


def test_nothing_comes_of_nothing() -> None:
    assert torch.equal(orthogonalized(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_a_stack_is_trained_like_its_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 10, 6, generator=generator), torch.randn(4, 3, 10, 6, generator=generator)
    stack, alone = nn.Parameter(start.clone()), [nn.Parameter(matrix.clone()) for matrix in start]
    together, apart = Muon([stack], lr=0.1), Muon(alone, lr=0.1)
    for gradient in gradients:
        stack.grad = gradient.clone()
        for weight, own in zip(alone, gradient, strict=True):
            weight.grad = own.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([weight.detach() for weight in alone]))
    assert not torch.equal(stack.detach(), start)


@pytest.mark.parametrize(("shape", "size"), [((20, 80), 0.1), ((80, 20), 0.2)])
def test_a_step_has_the_learning_rate_as_its_spectral_norm(shape: tuple[int, int], size: float) -> None:
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = 1e-4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.1).step()
    assert torch.linalg.matrix_norm(weight.detach(), 2).item() == pytest.approx(size, rel=0.25)


def test_a_far_matrix_is_reached() -> None:
    """Least squares to a target, with a learning rate that falls."""
    generator = torch.Generator().manual_seed(0)
    target, inputs = torch.randn(12, 8, generator=generator), torch.randn(100, 8, generator=generator)
    weight = nn.Parameter(torch.zeros(12, 8))
    optimizer = Muon([weight], lr=0.2)
    first = None
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 200)
        loss = (inputs @ (weight - target).T).square().mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first is not None and loss.item() < 1e-3 * first
