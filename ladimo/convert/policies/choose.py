"""Chooses policies and layers, in pure functions of the measurements."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ladimo.convert.evaluation.variants import Rules
from ladimo.convert.policies.knapsack import solve_knapsack
from ladimo.convert.policies.routing_profile import LayerProfile
from ladimo.convert.recipe import PolicyRecipe
from ladimo.model.config import ModelConfig
from ladimo.policy import LayerRule

NAMED = ("full", "quality", "balanced", "fast")


def choose_rule(profile: LayerProfile, tau: float, recipe: PolicyRecipe) -> LayerRule:
    """LaDiMo's rule for one layer: TOP1 if nearly every token reaches tau with one expert, all k experts if nearly every token
    needs all k, and otherwise DYN(tau). A tau of 0 gives TOP1, a tau of 1 gives all k."""
    top1, full = profile.by_top_k[0].rule, profile.by_top_k[-1].rule
    if tau <= 0 or tau >= 1:
        return top1 if tau <= 0 else full
    dynamic = next(entry for entry in profile.by_tau if entry.rule.mass == tau)
    if dynamic.one_share >= recipe.top1_share:
        return top1
    if 1 - dynamic.full_share <= recipe.full_share:
        return full
    return dynamic.rule


@dataclass(frozen=True, slots=True)
class Option:
    """An option of one layer. experts: the mean number of experts that run per token, or that a batch of 32 tokens reads.
    damage: KL divergence from the dense model in nats, if only this layer has this rule."""

    rule: LayerRule
    experts: float
    damage: float


def best_rules(options: Mapping[int, Sequence[Option]], config: ModelConfig, target: float) -> Rules:
    """One option for each converted layer, with the least sum of damages at a cost of at most `target`. The cost is the share
    of the dense model's active parameters."""
    layers = sorted(options)
    none = dict.fromkeys(layers, 0.0)
    fixed = _cost(none, config)

    def share(index: int, experts: float) -> float:
        return _cost({**none, index: experts}, config) - fixed

    costs = [[share(index, option.experts) for option in options[index]] for index in layers]
    damages = [[option.damage for option in options[index]] for index in layers]
    picks = solve_knapsack(costs, damages, target - fixed)
    rules = {index: options[index][pick].rule for index, pick in zip(layers, picks, strict=True)}
    return tuple(rules.get(index) for index in range(config.num_hidden_layers))


def spread(options: Mapping[int, Sequence[Option]], config: ModelConfig, points: int) -> list[Rules]:
    """Solutions for `points` targets between the most expensive and the cheapest choice, in this order, without duplicates."""
    ends = []
    for pick in (max, min):
        experts = {index: pick(option.experts for option in layer) for index, layer in options.items()}
        ends.append(_cost(experts, config))
    targets = [ends[0] + (ends[1] - ends[0]) * (point + 1) / max(1, points) for point in range(points)]
    return list(dict.fromkeys(best_rules(options, config, target) for target in targets))


def named_policies(profiles: Mapping[int, LayerProfile], config: ModelConfig, recipe: PolicyRecipe) -> dict[str, Rules]:
    """The policies full, quality, balanced and fast, by LaDiMo's rule. Every converted layer of `config` has a profile."""
    taus = zip(NAMED, (1.0, recipe.quality, recipe.balanced, recipe.fast), strict=True)
    return {
        name: tuple(
            None if layer is None else choose_rule(profiles[index], tau, recipe) for index, layer in enumerate(config.layers)
        )
        for name, tau in taus
    }


def interpolate(errors: Sequence[float], damages: Sequence[float], error: float) -> float:
    """The damage of an option with layer error `error`, from options with known damage. Between two of these it is interpolated
    on logarithmic scales. Outside their range it is proportional to the error."""
    known = sorted((max(e, 1e-12), max(d, 1e-12)) for e, d in zip(errors, damages, strict=True))
    error = max(error, 1e-12)
    if error <= known[0][0] or len(known) == 1:
        return known[0][1] * min(1.0, error / known[0][0]) if error <= known[0][0] else known[0][1] * error / known[0][0]
    if error >= known[-1][0]:
        return known[-1][1] * error / known[-1][0]
    after = next(place for place, (e, _) in enumerate(known) if e >= error)
    (low, below), (high, above) = known[after - 1], known[after]
    share = math.log(error / low) / math.log(high / low) if high > low else 0.0
    return math.exp((1 - share) * math.log(below) + share * math.log(above))


def choose_layers(perplexity: Mapping[int, float], savings: Mapping[int, float], target_active: float) -> tuple[int, ...]:
    """The layers to convert: the least damaging first, at least one, until the model's cost is at most the target.

    perplexity: by layer, with only this layer converted. savings: by layer, the share of active parameters that it saves.
    """
    chosen: list[int] = []
    for layer in sorted(perplexity, key=lambda layer: (perplexity[layer], layer)):
        if chosen and 1.0 - sum(savings[index] for index in chosen) <= target_active:
            break
        chosen.append(layer)
    return tuple(sorted(chosen))


def full_cost(config: ModelConfig) -> float:
    """Active parameters under policy `full`, divided by those of the dense model."""
    return config.active_parameters_ratio(
        tuple(None if layer is None else float(layer.num_experts_per_tok) for layer in config.layers)
    )


def _cost(experts: Mapping[int, float], config: ModelConfig) -> float:
    """Active parameters with so many experts in each converted layer, divided by those of the dense model."""
    return config.active_parameters_ratio(tuple(experts.get(index) for index in range(config.num_hidden_layers)))
