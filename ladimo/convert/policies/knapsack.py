"""Finds the best choice for each layer within a budget: a multiple-choice knapsack in plain numbers."""

from collections.abc import Sequence

import numpy as np

BINS = 4000  # units of the budget; costs are rounded up to whole units


def solve_knapsack(costs: Sequence[Sequence[float]], damages: Sequence[Sequence[float]], budget: float) -> tuple[int, ...]:
    """The number of an option for each layer. The sum of damages is the least for which the sum of costs is at most `budget`.

    costs[layer][option] and damages[layer][option]. If even the cheapest options exceed the budget, these are chosen. This is
    dynamic programming, which is exact except for the rounding of costs.
    """
    least = [min(layer) for layer in costs]
    spare = budget - sum(least)
    if spare <= 0:
        return tuple(min(range(len(layer)), key=layer.__getitem__) for layer in costs)
    unit = spare / BINS
    total = np.zeros(BINS + 1)  # for each cost, the least damage of the layers so far
    chosen = np.zeros((len(costs), BINS + 1), dtype=np.int64)
    units = [[int(np.ceil((cost - low) / unit - 1e-6)) for cost in layer] for layer, low in zip(costs, least, strict=True)]
    for layer, (layer_units, layer_damages) in enumerate(zip(units, damages, strict=True)):
        best = np.full(BINS + 1, np.inf)
        for option, (cost, damage) in enumerate(zip(layer_units, layer_damages, strict=True)):
            if cost > BINS:
                continue
            value = np.full(BINS + 1, np.inf)
            value[cost:] = total[: BINS + 1 - cost] + damage
            better = value < best
            best[better], chosen[layer][better] = value[better], option
        total = best
    place, picks = BINS, []
    for layer in reversed(range(len(costs))):
        option = int(chosen[layer][place])
        picks.append(option)
        place -= units[layer][option]
    return tuple(reversed(picks))
