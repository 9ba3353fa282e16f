"""Measured policies and the frontier: what `convert` and `profile` do alike, whatever made the candidates."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from ladimo.convert.evaluation.measure import Measurement, figures, measure
from ladimo.convert.evaluation.variants import DISTINCT_BATCH, Rules
from ladimo.convert.policies.choose import NAMED, Option, interpolate
from ladimo.convert.policies.routing_profile import LayerProfile, RuleProfile
from ladimo.convert.streamed_model import ExpertSource, StreamedModel
from ladimo.model.config import ModelConfig
from ladimo.policy import Frontier, FrontierPoint, LayerRule, RoutingPolicy, pareto

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Guard:
    """Find the cheapest rules whose perplexity is at most `ratio` times the dense one, along `path`: dearest first, each
    cheaper and worse than the one before."""

    ratio: float
    path: Sequence[Rules]

    @property
    def name(self) -> str:
        return f"ratio-{self.ratio:g}"


@dataclass(frozen=True, slots=True)
class MeasuredPolicies:
    """Policies with their figures on the evaluation text, in the order full, quality, balanced, fast, others."""

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


def measure_frontier(
    dense: StreamedModel,
    experts: ExpertSource,
    config: ModelConfig,
    candidates: Mapping[str, Rules],
    blocks: Tensor,
    guard: Guard | None = None,
) -> MeasuredPolicies:
    """Measure each candidate end to end on token blocks [B, S]; `candidates` has at least the named policies, and `config` the
    layers they are for. Two frontiers: of points chosen by what one token reads and by what a batch of 32 reads."""
    chosen = dict(candidates)
    reference: Rules = (None,) * config.num_hidden_layers
    measured = measure(dense, experts, blocks, [reference, *chosen.values()], reference)
    perplexity = measured[reference].perplexity
    if guard is not None:
        found = _cheapest_within(dense, experts, blocks, guard, measured, perplexity)
        if found is None:
            logger.warning("no policy keeps the perplexity within %g times the dense one", guard.ratio)
        else:
            chosen[guard.name] = found
    for better, cheaper in pairwise(NAMED):  # predictions have this order; a measurement on other text may not keep it
        costs = [config.active_parameters_ratio(measured[chosen[name]].experts_per_token) for name in (better, cheaper)]
        if costs[1] > costs[0]:
            chosen[cheaper] = chosen[better]
    policies = [RoutingPolicy(name, describe_rules(rules), rules) for name, rules in chosen.items()]
    entries = [figures(policy, measured[policy.layers], config, perplexity) for policy in policies]
    points = tuple(point for batch in (1, DISTINCT_BATCH) for point in _frontier(policies, measured, config, perplexity, batch))
    return MeasuredPolicies(policies, entries, Frontier(points), perplexity)


def routed_options(
    dense: StreamedModel,
    experts: ExpertSource,
    config: ModelConfig,
    profiles: Mapping[int, LayerProfile],
    blocks: Tensor,
    batch: int = 1,
) -> dict[int, list[Option]]:
    """What each routed layer may do, with the damage on token blocks [B, S]: the rule with the least error and the cheapest are
    measured alone in an otherwise dense model, the rest is interpolated by layer error."""
    depth = config.num_hidden_layers
    reference: Rules = (None,) * depth
    known = {index: _distinct_rules(profile) for index, profile in profiles.items()}

    def alone(index: int, rule: LayerRule) -> Rules:
        return tuple(rule if layer == index else None for layer in range(depth))

    ends = {
        index: [min(rules, key=lambda entry: entry.error), min(rules, key=lambda entry: entry.experts_per_token)]
        for index, rules in known.items()
    }
    variants = [alone(index, entry.rule) for index, pair in ends.items() for entry in pair]
    measured = measure(dense, experts, blocks, [reference, *variants], reference)
    options: dict[int, list[Option]] = {}
    for index, rules in known.items():
        errors = [entry.error for entry in ends[index]]
        damages = [measured[alone(index, entry.rule)].kl or 0.0 for entry in ends[index]]
        options[index] = [
            Option(
                rule=entry.rule,
                experts=entry.experts_per_token if batch == 1 else entry.distinct_experts,
                damage=interpolate(errors, damages, entry.error),
            )
            for entry in rules
        ]
    return options


def policy_name(cost: float) -> str:
    """Of a policy that the solver found: by its share of active parameters in percent."""
    return f"active-{100 * cost:.1f}"


def rule_name(rule: LayerRule | None) -> str:
    """TOP2, DYN(0.8), 5 fixed (a static mask), or dense; other limits are added, as in "TOP4 relative_floor 0.3"."""
    if rule is None:
        return "dense"
    if not rule.limits and rule.experts is not None and rule.top_k >= len(rule.experts):
        return f"{len(rule.experts)} fixed"
    name = f"TOP{rule.top_k}" if rule.mass is None else f"DYN({rule.mass:g})"
    return name + "".join(f" {limit} {value:g}" for limit, value in rule.limits.items() if limit != "mass")


def describe_rules(rules: Rules) -> str:
    """Such as "TOP2 in 3 layers, DYN(0.8) in 2 layers"."""
    names = [rule_name(rule) for rule in rules if rule is not None]
    counts = [f"{name} in {names.count(name)} layer{'s' * (names.count(name) > 1)}" for name in dict.fromkeys(names)]
    return ", ".join(counts)


def _distinct_rules(profile: LayerProfile) -> list[RuleProfile]:
    """The profile's rules, of those with equal cost at batch 1 and 32 the one with the least error."""
    best: dict[tuple[float, float], RuleProfile] = {}
    for entry in profile.by_top_k + profile.by_tau:
        key = (round(entry.experts_per_token, 2), round(entry.distinct_experts, 2))
        if key not in best or entry.error < best[key].error:
            best[key] = entry
    return list(best.values())


def _cheapest_within(
    dense: StreamedModel,
    experts: ExpertSource,
    blocks: Tensor,
    guard: Guard,
    measured: dict[Rules, Measurement],
    perplexity: float,
) -> Rules | None:
    """By bisection over the path; what it measures is added to `measured`."""
    low, high = -1, len(guard.path)  # path[low] is within, path[high] is not
    while high - low > 1:
        middle = (low + high) // 2
        rules = guard.path[middle]
        if rules not in measured:
            measured |= measure(dense, experts, blocks, [rules, (None,) * len(rules)], (None,) * len(rules))
        if measured[rules].perplexity <= guard.ratio * perplexity:
            low = middle
        else:
            high = middle
    return None if low < 0 else guard.path[low]


def _frontier(
    policies: Sequence[RoutingPolicy],
    measured: Mapping[Rules, Measurement],
    config: ModelConfig,
    perplexity: float,
    batch: int,
) -> tuple[FrontierPoint, ...]:
    """Policies that nothing cheaper beats at this batch size. Equal rules under two names are one point; the name that comes
    first keeps it."""
    points = {
        policy.layers: FrontierPoint(
            batch=batch,
            policy=policy.name,
            active_parameters_ratio=config.active_parameters_ratio(measured[policy.layers].experts_per_token),
            perplexity=measured[policy.layers].perplexity,
            perplexity_ratio=measured[policy.layers].perplexity / perplexity,
            experts_per_token=measured[policy.layers].experts_per_token,
        )
        for policy in reversed(policies)
    }
    if batch == 1:
        return pareto(points.values())
    reads = {point.policy: config.active_parameters_ratio(measured[rules].distinct_experts) for rules, point in points.items()}
    kept: list[FrontierPoint] = []
    for point in sorted(points.values(), key=lambda point: (reads[point.policy], point.perplexity)):
        if not kept or point.perplexity < kept[-1].perplexity:
            kept.append(point)
    return pareto(kept)  # and by active parameters, which is what the knob walks
