"""Candidate policies of a converted model: the named ones and what the solver finds between them. Needs no training.

For layers trained with a router the options are the rules of its profile; for those of method elastic the rules that the named
policies hold: the exact partition and each budget's substitutes, fixed or routed.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ladimo.convert.evaluation.measure import measure
from ladimo.convert.evaluation.variants import DISTINCT_BATCH, Rules
from ladimo.convert.policies.choose import Option, named_policies, spread
from ladimo.convert.policies.frontier import Guard, policy_name, routed_options
from ladimo.convert.policies.routing_profile import LayerProfile
from ladimo.convert.recipe import Recipe
from ladimo.convert.streamed_model import ExpertSource, StreamedModel
from ladimo.model.config import ModelConfig
from ladimo.policy import LayerRule

GUARD_POINTS = 64  # how finely the path is cut that a perplexity guard is looked for on

Candidates = tuple[dict[str, Rules], Guard | None]


def routed_candidates(
    dense: StreamedModel,
    experts: ExpertSource,
    config: ModelConfig,
    profiles: Mapping[int, LayerProfile],
    holdout: Tensor,
    recipe: Recipe,
) -> Candidates:
    """LaDiMo's named policies and the solver's, at batch 1 and at batch 32, from damage on holdout blocks [B, S]."""
    named = named_policies(profiles, config, recipe.policies)
    if not profiles or not recipe.policies.points:
        return named, None
    options = routed_options(dense, experts, config, profiles, holdout)
    wide = routed_options(dense, experts, config, profiles, holdout, DISTINCT_BATCH)
    extra = spread(options, config, recipe.policies.points) + spread(wide, config, recipe.policies.points // 2)
    costs = {index: {option.rule: option.experts for option in layer} for index, layer in options.items()}
    return _with_extra(named, extra, config, costs), _guard(options, config, recipe)


def budget_candidates(
    dense: StreamedModel,
    experts: ExpertSource,
    config: ModelConfig,
    named: Mapping[str, Rules],
    holdout: Tensor,
    recipe: Recipe,
) -> Candidates:
    """The named policies, and the solver's mixtures of their rules, at batch 1 and, where a rule routes, at batch 32, from the
    damage of each rule alone on holdout blocks [B, S]."""
    if not config.moe_layer_indices or not recipe.policies.points:
        return dict(named), None
    depth = config.num_hidden_layers
    reference: Rules = (None,) * depth
    stored = {index: list(dict.fromkeys(_rule(rules, index) for rules in named.values())) for index in config.moe_layer_indices}
    full = {index: _rule(named["full"], index) for index in config.moe_layer_indices}

    def alone(index: int, rule: LayerRule) -> Rules:
        return tuple(rule if layer == index else None for layer in range(depth))

    variants = [alone(index, rule) for index, rules in stored.items() for rule in rules if rule != full[index]]
    measured = measure(dense, experts, holdout, [reference, *variants], reference)

    def option(index: int, rule: LayerRule, batch: int) -> Option:
        if rule == full[index]:
            return Option(rule, float(rule.top_k), 0.0)
        found = measured[alone(index, rule)]
        ran = float(rule.top_k) if batch == 1 else found.distinct_experts[index]
        return Option(rule, ran or 0.0, found.kl or 0.0)

    options, wide = (
        {index: [option(index, rule, batch) for rule in rules] for index, rules in stored.items()}
        for batch in (1, DISTINCT_BATCH)
    )
    extra = spread(options, config, recipe.policies.points)
    if wide != options:  # fixed experts cost the same in every batch
        extra += spread(wide, config, recipe.policies.points // 2)
    costs = {index: {rule: float(rule.top_k) for rule in rules} for index, rules in stored.items()}
    return _with_extra(named, extra, config, costs), _guard(options, config, recipe)


def _with_extra(
    named: Mapping[str, Rules],
    extra: Sequence[Rules],
    config: ModelConfig,
    costs: Mapping[int, Mapping[LayerRule, float]],
) -> dict[str, Rules]:
    """Each new solution under the name of its predicted cost."""
    chosen = dict(named)
    for rules in dict.fromkeys(extra):
        if rules not in chosen.values():
            experts = tuple(None if rule is None else costs[index][rule] for index, rule in enumerate(rules))
            chosen.setdefault(policy_name(config.active_parameters_ratio(experts)), rules)
    return chosen


def _guard(options: Mapping[int, Sequence[Option]], config: ModelConfig, recipe: Recipe) -> Guard | None:
    if not recipe.max_perplexity_ratio:
        return None
    return Guard(recipe.max_perplexity_ratio, spread(options, config, GUARD_POINTS))


def _rule(rules: Rules, index: int) -> LayerRule:
    rule = rules[index]
    assert rule is not None
    return rule
