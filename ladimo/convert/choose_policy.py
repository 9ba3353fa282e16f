"""From profiles to policies and layers: pure functions of what was measured."""

from collections.abc import Mapping

from ladimo.convert.profile import LayerProfile
from ladimo.convert.recipe import PolicyRecipe
from ladimo.model.config import ModelConfig
from ladimo.policy import LayerRule

Rules = tuple[LayerRule | None, ...]  # one per layer, None where dense
NAMED = ("full", "quality", "balanced", "fast")


def choose_rule(profile: LayerProfile, tau: float, recipe: PolicyRecipe) -> LayerRule:
    """LaDiMo's per-layer decision: TOP1 where nearly every token needs one expert to reach tau, all k where nearly none needs
    fewer, DYN(tau) between. A tau of 0 is TOP1, of 1 all k."""
    top1, full = profile.by_top_k[0].rule, profile.by_top_k[-1].rule
    if tau <= 0 or tau >= 1:
        return top1 if tau <= 0 else full
    dynamic = next(entry for entry in profile.by_tau if entry.rule.mass == tau)
    if dynamic.one_share >= recipe.top1_share:
        return top1
    if 1 - dynamic.full_share <= recipe.full_share:
        return full
    return dynamic.rule


def predicted_cost(rules: Rules, profiles: Mapping[int, LayerProfile], config: ModelConfig) -> float:
    """Active / dense parameters under these rules, from the experts per token that the profiles saw."""
    experts: list[float | None] = []
    for layer, rule in enumerate(rules):
        if rule is None:
            experts.append(None)
            continue
        known = profiles[layer].by_top_k + profiles[layer].by_tau
        experts.append(next(entry.experts_per_token for entry in known if entry.rule == rule))
    return config.active_parameters_ratio(tuple(experts))


def candidate_policies(profiles: Mapping[int, LayerProfile], config: ModelConfig, recipe: PolicyRecipe) -> dict[str, Rules]:
    """The named policies and up to `recipe.points` more by tau ("mass-0.65"), spread evenly between TOP1 and full in cost.

    `config` has the converted layers, each of which has a profile.
    """

    def under(tau: float) -> Rules:
        return tuple(
            None if layer is None else choose_rule(profiles[index], tau, recipe) for index, layer in enumerate(config.layers)
        )

    named = dict(zip(NAMED, (1.0, recipe.quality, recipe.balanced, recipe.fast), strict=True))
    chosen = {name: under(tau) for name, tau in named.items()}
    if recipe.points == 0 or not profiles:
        return chosen
    taus = [entry.rule.mass for entry in next(iter(profiles.values())).by_tau]
    extra = {f"mass-{tau:g}": under(tau) for tau in [0.0, *taus] if tau is not None}
    costs = {name: predicted_cost(rules, profiles, config) for name, rules in extra.items()}
    lowest, highest = costs["mass-0"], predicted_cost(chosen["full"], profiles, config)
    for point in range(recipe.points):
        target = lowest + (highest - lowest) * point / recipe.points
        name = min(extra, key=lambda name: abs(costs[name] - target))
        if extra[name] not in chosen.values():
            chosen[name] = extra[name]
    return chosen


def choose_layers(perplexity: Mapping[int, float], savings: Mapping[int, float], target_active: float) -> tuple[int, ...]:
    """Layers to convert: least damaging first, at least one, until the model's cost is at most the target.

    perplexity: with only that layer converted. savings: the share of active parameters that converting it saves.
    """
    chosen: list[int] = []
    for layer in sorted(perplexity, key=lambda layer: (perplexity[layer], layer)):
        if chosen and 1.0 - sum(savings[index] for index in chosen) <= target_active:
            break
        chosen.append(layer)
    return tuple(sorted(chosen))


def full_cost(config: ModelConfig) -> float:
    """Active / dense parameters under policy `full`."""
    return config.active_parameters_ratio(
        tuple(None if layer is None else float(layer.num_experts_per_tok) for layer in config.layers)
    )
