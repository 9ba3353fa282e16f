"""Balanced clusters of neurons: every cluster has the same size.

Legend: T tokens, D hidden_size, N neurons (intermediate_size), E experts, X features.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

PRICE_ROUNDS = 100
MAX_ROUNDS = 20


def expert_sizes(num_neurons: int, num_experts: int) -> Tensor:
    """Sizes [E] int64 that differ by at most one, the larger ones first."""
    return torch.tensor([(num_neurons - expert - 1) // num_experts + 1 for expert in range(num_experts)])


def as_partition(labels: Tensor, num_experts: int) -> Tensor:
    """Labels [N] in 0 .. E - 1 -> neuron numbers [E, size of the largest expert], rising in each row. -1 fills shorter rows."""
    counts = torch.bincount(labels, minlength=num_experts)
    width = int(counts.max())
    order = labels.argsort(stable=True)
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    partition = torch.full((num_experts, width), -1, dtype=torch.int64)
    partition[labels[order], place] = order
    return partition


def balanced_kmeans(features: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """Labels [N] of clusters of equal size (`expert_sizes`) with small squared distances to their means. features: [N, X].

    This is Lloyd's algorithm with the seeds of k-means++. It runs until no label changes. The assignment step is the exact
    `balanced_assignment`, so the total distance never rises.
    """
    sizes = expert_sizes(len(features), num_experts)
    centres = features[_spread_seeds(features, num_experts, generator)]
    labels = torch.full((len(features),), -1)
    for _ in range(MAX_ROUNDS):
        cost = centres.pow(2).sum(dim=1) - 2 * features @ centres.t()
        previous, labels = labels, balanced_assignment(cost, sizes)
        if torch.equal(labels, previous):
            break
        members = F.one_hot(labels, num_experts).to(features)
        centres = (members.t() @ features) / members.sum(dim=0).unsqueeze(1)
    return labels


def balanced_assignment(cost: Tensor, sizes: Tensor) -> Tensor:
    """Labels [N] with the least sum of cost[n, label], where expert e gets exactly sizes[e] neurons. cost: [N, E]. Exact.

    First every expert gets a price, by entropic optimal transport (Sinkhorn's iteration). With these prices, the neurons'
    cheapest choices are nearly balanced. They are optimal for the sizes that result. Then neurons are moved along shortest
    paths of exchanges, from experts with too many neurons to experts with too few. The labels stay optimal (successive shortest
    paths for the transport problem).
    """
    cost = cost.detach().to("cpu", torch.float64)
    labels = (cost + _prices(cost, sizes)).argmin(dim=1)
    surplus = torch.bincount(labels, minlength=len(sizes)) - sizes
    moves = torch.full((len(sizes), len(sizes)), torch.inf, dtype=torch.float64)  # cheapest change from expert to expert
    movers = torch.zeros(len(sizes), len(sizes), dtype=torch.int64)  # and the neuron that makes it
    changed = set(range(len(sizes)))
    while surplus.any():
        for expert in changed:
            members = (labels == expert).nonzero().squeeze(1)
            if len(members):
                moves[expert], best = (cost[members] - cost[members, expert, None]).min(dim=0)
                movers[expert] = members[best]
            else:
                moves[expert] = torch.inf
        path = _cheapest_path(moves, surplus > 0, surplus < 0)
        chain = [movers[source, target] for source, target in zip(path, path[1:], strict=False)]
        for neuron, target in zip(chain, path[1:], strict=True):
            labels[neuron] = target
        surplus[path[0]] -= 1
        surplus[path[-1]] += 1
        changed = set(path)
    return labels


def _prices(cost: Tensor, sizes: Tensor) -> Tensor:
    """Prices [E] to add to the experts' costs. With them, the neurons' cheapest choices have nearly the wanted sizes."""
    temperature = 0.02 * cost.std(dim=1, correction=0).mean().clamp(min=1e-30)
    scaled, prices = -cost / temperature, torch.zeros(len(sizes), dtype=cost.dtype)
    for _ in range(PRICE_ROUNDS):
        load = (scaled - prices).softmax(dim=1).sum(dim=0)
        prices = prices + (load.clamp(min=1e-9) / sizes.clamp(min=1e-9)).log()
    return prices * temperature


def _cheapest_path(moves: Tensor, sources: Tensor, targets: Tensor) -> list[int]:
    """The path of experts from one of `sources` to one of `targets` [E] with the least sum of `moves` [E, E] (Bellman-Ford;
    there are no negative cycles)."""
    rounding = 1e-12 * moves[moves.isfinite()].abs().max()
    distance = torch.zeros(len(moves), dtype=moves.dtype).masked_fill(~sources, torch.inf)
    before = torch.full((len(moves),), -1)
    for _ in range(len(moves) - 1):
        through, step = (distance[:, None] + moves).min(dim=0)
        shorter = through < distance - rounding
        distance, before = torch.where(shorter, through, distance), torch.where(shorter, step, before)
        if not shorter.any():
            break
    path = [int(distance.masked_fill(~targets, torch.inf).argmin())]
    while before[path[0]] >= 0:
        path.insert(0, int(before[path[0]]))
    return path


def _spread_seeds(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The numbers of `count` distant rows. Each is drawn in proportion to its squared distance to earlier ones (k-means++)."""
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    nearest = torch.full((len(features),), torch.inf)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).pow(2).sum(dim=1).cpu())
        weights = nearest.clone()
        weights[chosen] = 0.0
        if not weights.any():  # all other rows equal one of the seeds
            weights = torch.ones(len(features)).index_fill_(0, torch.tensor(chosen), 0.0)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return torch.tensor(chosen)
