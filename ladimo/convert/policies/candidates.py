"""Candidate policies of a converted model: the named ones, and others that the solver finds between them. Nothing is trained.

For a layer with its own router, the options are the rules of its profile. For a layer with substitutes, the options are the
rules that the named policies have.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ladimo.convert.evaluation.measure import Measurement, measure
from ladimo.convert.evaluation.variants import DISTINCT_BATCH, Rules, variant_of
from ladimo.convert.policies.choose import Option, interpolate, named_policies, spread
from ladimo.convert.policies.routing_profile import LayerProfile, RuleProfile
from ladimo.convert.policies.sensitivity import rule_damages
from ladimo.convert.recipe import Recipe
from ladimo.convert.streamed_model import ExpertSource, StreamedModel
from ladimo.model.config import ModelConfig
from ladimo.policy import LayerRule, RoutingPolicy

GUARD_STEPS = 64  # the number of solutions, from the most expensive to the cheapest, among which a guard's policy is searched


@dataclass(frozen=True)
class ConvertedModel:
    """A converted model to measure: its dense source, its expert layers and its configuration.

    A nested model contains its dense source, so `dense` is then the model itself. So it is if the model has another attention
    than its source. The source is then `apart`, as it is where a nested model's top is 8 bits.
    """

    dense: StreamedModel
    experts: ExpertSource
    config: ModelConfig
    apart: StreamedModel | None = None

    @classmethod
    def of(cls, own: StreamedModel, source: StreamedModel) -> "ConvertedModel":
        """The model of a complete checkpoint `own`. source: its dense source, or `own` if it contains that."""
        if own.config.qk_pairs or own.config.nested_top_bits:
            return cls(own, own.experts, own.config, source)
        return cls(own if own.config.nested_bits else source, own.experts, own.config)

    def measure(self, blocks: Tensor, variants: Iterable[Rules]) -> dict[Rules, Measurement]:
        """Run token blocks [B, S] through the variants and the reference; see `measure`."""
        return measure(self.dense, self.experts, blocks, [self.reference, *variants], self.reference, self.apart)

    @property
    def reference(self) -> Rules:
        """The dense model as a variant."""
        if not self.config.nested_bits or self.apart is not None:
            return (None,) * self.config.num_hidden_layers
        full = (None if layer is None else LayerRule.full(layer) for layer in self.config.layers)
        return variant_of(RoutingPolicy("full", "", tuple(full)), self.config)


@dataclass(frozen=True, slots=True)
class Guard:
    """Asks for the cheapest rules with at most `ratio` times the dense model's perplexity. path: the rules to search. Each is
    cheaper and less accurate than the one before."""

    ratio: float
    path: Sequence[Rules]

    @property
    def name(self) -> str:
        return f"ratio-{self.ratio:g}"


@dataclass(frozen=True, slots=True)
class Candidates:
    """rules: by the policy's name; at least full, quality, balanced and fast. guard: the perplexity guard, if there is one."""

    rules: Mapping[str, Rules]
    guard: Guard | None = None


def routed_candidates(
    model: ConvertedModel, profiles: Mapping[int, LayerProfile], blocks: Tensor, recipe: Recipe
) -> Candidates:
    """LaDiMo's named policies and those of the solver, for batches of 1 and 32. blocks: token blocks [B, S] for the damage."""
    named = named_policies(profiles, model.config, recipe.policies)
    if not profiles or not recipe.policies.points:
        return Candidates(named)
    options, wide = routed_options(model, profiles, blocks)
    costs = {index: {option.rule: option.experts for option in layer} for index, layer in options.items()}
    return _solved(named, options, wide, model.config, costs, recipe)


def budget_candidates(model: ConvertedModel, named: Mapping[str, Rules], blocks: Tensor, recipe: Recipe) -> Candidates:
    """The named policies and the solver's mixtures of their rules, for batches of 1, and also of 32 if a rule routes. blocks:
    token blocks [B, S] for the damage of each rule."""
    config = model.config
    if not config.moe_layer_indices or not recipe.policies.points:
        return Candidates(dict(named))
    stored = {index: list(dict.fromkeys(_rule(rules, index) for rules in named.values())) for index in config.moe_layer_indices}
    full = {index: _rule(named["full"], index) for index in config.moe_layer_indices}
    changed = {index: [rule for rule in rules if rule != full[index]] for index, rules in stored.items()}
    damages = rule_damages(model.dense, model.experts, changed, blocks)

    def option(index: int, rule: LayerRule, batch: int) -> Option:
        if rule == full[index]:
            return Option(rule, float(rule.top_k), 0.0)
        found = damages[index][rule]
        return Option(rule, float(rule.top_k) if batch == 1 else found.distinct_experts, found.kl)

    options, wide = (
        {index: [option(index, rule, batch) for rule in rules] for index, rules in stored.items()}
        for batch in (1, DISTINCT_BATCH)
    )
    costs = {index: {rule: float(rule.top_k) for rule in rules} for index, rules in stored.items()}
    return _solved(named, options, wide, config, costs, recipe)


def routed_options(
    model: ConvertedModel, profiles: Mapping[int, LayerProfile], blocks: Tensor
) -> tuple[dict[int, list[Option]], dict[int, list[Option]]]:
    """The options of each routed layer, with the costs of batch 1 and of batch 32. The damage of the most accurate and of the
    cheapest rule is estimated on token blocks [B, S]. For the other rules it is interpolated by layer error."""
    known = {index: _distinct_rules(profile) for index, profile in profiles.items()}
    ends = {
        index: [min(rules, key=lambda entry: entry.error), min(rules, key=lambda entry: entry.experts_per_token)]
        for index, rules in known.items()
    }
    wanted = {index: list(dict.fromkeys(entry.rule for entry in pair)) for index, pair in ends.items()}
    damages = rule_damages(model.dense, model.experts, wanted, blocks)
    narrow: dict[int, list[Option]] = {}
    wide: dict[int, list[Option]] = {}
    for index, rules in known.items():
        errors = [entry.error for entry in ends[index]]
        found = [damages[index][entry.rule].kl for entry in ends[index]]
        lost = {entry.rule: interpolate(errors, found, entry.error) for entry in rules}
        narrow[index] = [Option(entry.rule, entry.experts_per_token, lost[entry.rule]) for entry in rules]
        wide[index] = [Option(entry.rule, entry.distinct_experts, lost[entry.rule]) for entry in rules]
    return narrow, wide


def policy_name(cost: float) -> str:
    """The name of a policy that the solver found. It has the share of active parameters in percent."""
    return f"active-{100 * cost:.1f}"


def _solved(
    named: Mapping[str, Rules],
    options: Mapping[int, Sequence[Option]],
    wide: Mapping[int, Sequence[Option]],
    config: ModelConfig,
    costs: Mapping[int, Mapping[LayerRule, float]],
    recipe: Recipe,
) -> Candidates:
    """The named policies, the solver's solutions, which are named by their predicted costs, and the guard."""
    extra = spread(options, config, recipe.policies.points)
    if wide != options:  # fixed experts cost the same in every batch
        extra += spread(wide, config, recipe.policies.points // 2)
    chosen = dict(named)
    for rules in dict.fromkeys(extra):
        if rules not in chosen.values():
            experts = tuple(None if rule is None else costs[index][rule] for index, rule in enumerate(rules))
            chosen.setdefault(policy_name(config.active_parameters_ratio(experts)), rules)
    ratio = recipe.max_perplexity_ratio
    return Candidates(chosen, Guard(ratio, spread(options, config, GUARD_STEPS)) if ratio else None)


def _distinct_rules(profile: LayerProfile) -> list[RuleProfile]:
    """The rules of a profile. Of rules with equal costs at batch 1 and at batch 32, only the one with the least error."""
    best: dict[tuple[float, float], RuleProfile] = {}
    for entry in profile.rules:
        key = (round(entry.experts_per_token, 2), round(entry.distinct_experts, 2))
        if key not in best or entry.error < best[key].error:
            best[key] = entry
    return list(best.values())


def _rule(rules: Rules, index: int) -> LayerRule:
    rule = rules[index]
    assert rule is not None
    return rule
