"""From profiles to measured policies and the frontier: what `convert` and `profile` do alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from ladimo.convert.choose_policy import NAMED, Rules, candidate_policies
from ladimo.convert.evaluate import ExpertSource, figures, measure
from ladimo.convert.profile import LayerProfile
from ladimo.convert.recipe import PolicyRecipe
from ladimo.convert.teacher import StreamedModel
from ladimo.model.config import ModelConfig
from ladimo.policy import Frontier, FrontierPoint, LayerRule, RoutingPolicy, pareto


@dataclass(frozen=True, slots=True)
class OperatingPoints:
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
    def from_dict(cls, raw: Mapping[str, Any]) -> "OperatingPoints":
        return cls(
            policies=[RoutingPolicy.from_dict(policy) for policy in raw["policies"]],
            figures=raw["figures"],
            frontier=Frontier.from_dict(raw["frontier"]),
            dense_perplexity=raw["dense_perplexity"],
        )


def measure_operating_points(
    dense: StreamedModel,
    experts: ExpertSource,
    config: ModelConfig,
    profiles: Mapping[int, LayerProfile],
    blocks: Tensor,
    recipe: PolicyRecipe,
) -> OperatingPoints:
    """Choose the policies of `config` (with its converted layers) and measure each end to end on token blocks [B, S]."""
    chosen = candidate_policies(profiles, config, recipe)
    reference: Rules = (None,) * config.num_hidden_layers
    measured = measure(dense, experts, blocks, [reference, *chosen.values()], reference)
    for better, cheaper in pairwise(NAMED):  # profiles predict this order; a measurement on other text may not keep it
        costs = [config.active_parameters_ratio(measured[chosen[name]].experts_per_token) for name in (better, cheaper)]
        if costs[1] > costs[0]:
            chosen[cheaper] = chosen[better]
    policies = [RoutingPolicy(name, describe_rules(rules), rules) for name, rules in chosen.items()]
    perplexity = measured[reference].perplexity
    entries = [figures(policy, measured[policy.layers], config, perplexity) for policy in policies]
    # Equal rules under two names are one point; the name that comes first keeps it.
    points = {
        policy.layers: FrontierPoint(
            batch=1,
            policy=policy.name,
            active_parameters_ratio=config.active_parameters_ratio(measured[policy.layers].experts_per_token),
            perplexity=measured[policy.layers].perplexity,
            perplexity_ratio=measured[policy.layers].perplexity / perplexity,
            experts_per_token=measured[policy.layers].experts_per_token,
        )
        for policy in reversed(policies)
    }
    return OperatingPoints(policies, entries, Frontier(pareto(points.values())), perplexity)


def rule_name(rule: LayerRule | None) -> str:
    """TOP2, DYN(0.8), or dense."""
    if rule is None:
        return "dense"
    return f"TOP{rule.top_k}" if rule.mass is None else f"DYN({rule.mass:g})"


def describe_rules(rules: Rules) -> str:
    """Such as "TOP2 in 3 layers, DYN(0.8) in 2 layers"."""
    names = [rule_name(rule) for rule in rules if rule is not None]
    counts = [f"{name} in {names.count(name)} layer{'s' * (names.count(name) > 1)}" for name in dict.fromkeys(names)]
    return ", ".join(counts)
