"""Balanced assignment against every assignment there is, clusters against planted ones, statistics against plain sums."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.convert.ffn.clustering import as_partition, balanced_assignment, balanced_kmeans, expert_sizes
from ladimo.convert.ffn.hidden_channels import coactivation, hidden_channels, neuron_statistics
from ladimo.model.layers import GatedMLP


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def total(cost: Tensor, labels: Tensor) -> float:
    return cost[torch.arange(len(cost)), labels].sum().item()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ties", [False, True])
def test_assignment_is_the_best_of_all(seed: int, ties: bool) -> None:
    generator = seeded(seed)
    neurons, experts = int(torch.randint(4, 8, (1,), generator=generator)), 2 + seed % 2
    cost = torch.randn(neurons, experts, generator=generator)
    if ties:
        cost = cost.round()
    sizes = expert_sizes(neurons, experts)
    labels = balanced_assignment(cost, sizes)
    assert torch.equal(torch.bincount(labels, minlength=experts), sizes)
    places = [expert for expert in range(experts) for _ in range(sizes[expert])]
    best = min(total(cost, torch.tensor(order)) for order in set(itertools.permutations(places)))
    assert total(cost, labels) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize(
    "cost",
    [
        torch.zeros(100, 7),
        torch.zeros(64, 8).index_fill_(1, torch.tensor([3]), -5.0),  # everyone wants the same expert
        1 + 1e-8 * torch.rand(90, 90, generator=seeded(0)),
        torch.randint(0, 2, (300, 16), generator=seeded(1)).float(),
        torch.randn(200, 1, generator=seeded(2)),
    ],
    ids=["all alike", "one favourite", "nearly alike", "ties", "one expert"],
)
def test_assignment_is_balanced_whatever_the_cost(cost: Tensor) -> None:
    sizes = expert_sizes(*cost.shape)
    assert torch.equal(torch.bincount(balanced_assignment(cost, sizes), minlength=len(sizes)), sizes)


def test_no_exchange_improves_a_large_assignment() -> None:
    """Among 600 neurons no pair would rather be swapped."""
    cost = torch.randn(600, 12, generator=seeded(0)) + 2 * torch.rand(12, generator=seeded(1))
    labels = balanced_assignment(cost, expert_sizes(600, 12))
    own = cost[torch.arange(600), labels]
    swapped = cost[:, labels]  # [i, j]: i in the place of j
    assert (swapped + swapped.t() - own[:, None] - own[None]).min() > -1e-5


@pytest.mark.parametrize(("neurons", "experts"), [(90, 4), (90, 7), (8, 8), (5, 1)])
def test_partition_holds_each_neuron_once(neurons: int, experts: int) -> None:
    sizes = expert_sizes(neurons, experts)
    assert sizes.sum() == neurons and sizes.max() - sizes.min() <= 1
    labels = torch.arange(experts).repeat_interleave(sizes)[torch.randperm(neurons, generator=seeded(0))]
    partition = as_partition(labels, experts)
    assert partition.shape == (experts, -(-neurons // experts))
    for expert, row in enumerate(partition):
        assert torch.equal(row[row >= 0], (labels == expert).nonzero().squeeze(1))
    assert torch.equal(partition[partition >= 0].sort().values, torch.arange(neurons))


@pytest.mark.parametrize("experts", [2, 5])
def test_kmeans_finds_planted_clusters(experts: int) -> None:
    generator = seeded(3)
    centres = 5 * torch.randn(experts, 6, generator=generator)
    truth = torch.arange(experts).repeat(20)[torch.randperm(20 * experts, generator=generator)]
    labels = balanced_kmeans(centres[truth] + 0.3 * torch.randn(len(truth), 6, generator=generator), experts, generator)
    for expert in range(experts):
        assert len(truth[labels == expert].unique()) == 1


def test_kmeans_of_copies_is_balanced() -> None:
    assert torch.equal(torch.bincount(balanced_kmeans(torch.ones(10, 3), 4, seeded(0))), expert_sizes(10, 4))


def test_statistics_are_plain_means() -> None:
    """Streamed in chunks that do not divide the tokens, in bf16 weights too."""
    torch.manual_seed(0)
    mlp = GatedMLP(8, 12).bfloat16().requires_grad_(False)
    inputs = torch.randn(50, 8)
    gate, up, down = (part.weight.float() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    hidden = F.silu(inputs @ gate.t()) * (inputs @ up.t())
    torch.testing.assert_close(torch.cat(list(hidden_channels(mlp, inputs, chunk_tokens=7))), hidden)
    statistics = neuron_statistics(mlp, inputs, chunk_tokens=7)
    torch.testing.assert_close(statistics.mean, hidden.mean(dim=0))
    torch.testing.assert_close(statistics.magnitude, hidden.abs().mean(dim=0))
    contribution = hidden[:, :, None] * down.t()[None]  # [T, N, D]
    torch.testing.assert_close(statistics.importance, contribution.pow(2).sum(dim=2).mean(dim=0))

    units = F.silu(F.normalize(inputs, dim=1) @ F.normalize(gate, dim=1).t()) * (
        F.normalize(inputs, dim=1) @ F.normalize(up, dim=1).t()
    )
    among = torch.stack([(row >= row.sort().values[-3]) for row in units.abs()]).float()
    torch.testing.assert_close(coactivation(mlp, inputs, 3), among.t() @ among)
