"""Measures policies end to end, and makes the frontier of those that no cheaper policy beats."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from ladimo.convert.evaluation.measure import Measurement, batch_bytes_ratio, figures
from ladimo.convert.evaluation.variants import DISTINCT_BATCH, Rules, policy_of, variant_of
from ladimo.convert.policies.candidates import Candidates, ConvertedModel, Guard
from ladimo.convert.policies.choose import NAMED
from ladimo.convert.policies.descriptions import describe_rules
from ladimo.model.config import ModelConfig
from ladimo.policy import Frontier, FrontierPoint, RoutingPolicy, pareto

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MeasuredPolicies:
    """Policies with their figures on the evaluation text: full, quality, balanced, fast, then others."""

    policies: list[RoutingPolicy]
    figures: list[dict[str, Any]]
    frontier: Frontier
    dense_perplexity: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "policies": [policy.to_dict() for policy in self.policies],
            "figures": self.figures,
            "frontier": self.frontier.to_dict(),
            "dense_perplexity": self.dense_perplexity,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "MeasuredPolicies":
        return cls(
            policies=[RoutingPolicy.from_dict(policy) for policy in raw["policies"]],
            figures=raw["figures"],
            frontier=Frontier.from_dict(raw["frontier"]),
            dense_perplexity=raw["dense_perplexity"],
        )


def measure_frontier(model: ConvertedModel, candidates: Candidates, blocks: Tensor) -> MeasuredPolicies:
    """Measure each candidate on token blocks [B, S]. There are two frontiers. One compares policies by what a single token
    reads, the other by what a batch of 32 tokens reads."""
    chosen, config = dict(candidates.rules), model.config
    reference = model.reference
    measured = model.measure(blocks, chosen.values())
    perplexity = measured[reference].perplexity
    if candidates.guard is not None:
        found = _cheapest_within(model, blocks, candidates.guard, measured, perplexity)
        if found is None:
            logger.warning("no policy keeps the perplexity within %g times the dense one", candidates.guard.ratio)
        else:
            chosen[candidates.guard.name] = found
    # Each named policy should be cheaper than the one before. Measurements on another text may disagree.
    for better, cheaper in pairwise(NAMED):
        first, second = (policy_cost(chosen[name], measured[chosen[name]], config) for name in (better, cheaper))
        if second > first:
            chosen[cheaper] = chosen[better]
    policies = {
        rules: policy_of(name, describe_rules(rules, config), rules, config) for name, rules in reversed(chosen.items())
    }
    named = [policy_of(name, describe_rules(rules, config), rules, config) for name, rules in chosen.items()]
    entries = [figures(policy, measured[variant_of(policy, config)], config, perplexity) for policy in named]
    points = tuple(point for batch in (1, DISTINCT_BATCH) for point in _frontier(policies, measured, config, perplexity, batch))
    return MeasuredPolicies(named, entries, Frontier(points), perplexity)


def policy_cost(rules: Rules, measurement: Measurement, config: ModelConfig) -> float:
    """What the knob walks; see `FrontierPoint.cost`."""
    ratio = policy_of("rules", "", rules, config).bytes_ratio(config, measurement.experts_per_token, measurement.refined_rows)
    return config.active_parameters_ratio(measurement.experts_per_token) if ratio is None else ratio


def _cheapest_within(
    model: ConvertedModel, blocks: Tensor, guard: Guard, measured: dict[Rules, Measurement], perplexity: float
) -> Rules | None:
    """The cheapest rules within the guard's ratio, found by bisection over its path; None if there are none. New measurements
    are added to `measured`."""
    low, high = -1, len(guard.path)  # path[low] is within, path[high] is not
    while high - low > 1:
        middle = (low + high) // 2
        rules = guard.path[middle]
        if rules not in measured:
            measured |= model.measure(blocks, [rules])
        if measured[rules].perplexity <= guard.ratio * perplexity:
            low = middle
        else:
            high = middle
    return None if low < 0 else guard.path[low]


def _frontier(
    policies: Mapping[Rules, RoutingPolicy],
    measured: Mapping[Rules, Measurement],
    config: ModelConfig,
    perplexity: float,
    batch: int,
) -> tuple[FrontierPoint, ...]:
    """The policies that no cheaper policy beats at this batch size. Equal rules under two names are one point, under the first
    name. Policies that refine neurons are for single requests only."""
    points = {
        rules: FrontierPoint(
            batch=batch,
            policy=policy.name,
            active_parameters_ratio=config.active_parameters_ratio(measured[rules].experts_per_token),
            perplexity=measured[rules].perplexity,
            perplexity_ratio=measured[rules].perplexity / perplexity,
            experts_per_token=measured[rules].experts_per_token,
            bytes_ratio=policy.bytes_ratio(config, measured[rules].experts_per_token, measured[rules].refined_rows),
        )
        for rules, policy in policies.items()
    }
    if batch == 1:
        return pareto(points.values())
    # A batch that refines neurons reads fewer bytes but takes more time: the rows of single neurons lie far from each other.
    layers = config.num_hidden_layers
    whole = [rules for rules in points if not any(rule and rule.refine is not None for rule in rules[:layers])]
    reads = {points[rules].policy: batch_bytes_ratio(policies[rules], measured[rules], config) for rules in whole}
    kept: list[FrontierPoint] = []
    for point in sorted((points[rules] for rules in whole), key=lambda point: (reads[point.policy], point.perplexity)):
        if not kept or point.perplexity < kept[-1].perplexity:
            kept.append(point)
    return pareto(kept)  # also by cost, because an accuracy chooses by it
