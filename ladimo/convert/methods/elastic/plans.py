"""Plans of method elastic: the number of experts that each layer runs for a budget. All are values and pure functions."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ladimo.convert.evaluation.variants import Rules
from ladimo.convert.policies.choose import NAMED, Option, best_rules
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.policy import LayerRule

Damage = Mapping[int, Mapping[int, float]]  # KL in nats by layer and number of experts


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice of experts for a budget. budget: its number in the recipe. widths: for each layer, the experts that run per
    token; E: all experts. routed: the layers in which a router chooses the experts. In the other layers they are fixed."""

    budget: int
    widths: tuple[int, ...]
    routed: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Plan":
        return cls(raw["budget"], tuple(raw["widths"]), tuple(raw["routed"]))


@dataclass(frozen=True, slots=True)
class TrainedPlan:
    """A plan of the finished checkpoint. number: identifies its weights. curve: the loss curve of its end-to-end distillation.
    layer_errors: each layer's error before and after, if it was distilled layer by layer."""

    plan: Plan
    number: int
    curve: list[dict[str, Any]] = field(default_factory=list)
    layer_errors: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Planner:
    """Makes plans. dense: the dense model's configuration. candidates: the layers that may be narrowed. budgets: shares of the
    dense model's active parameters, most accurate first. contested: the numbers of the budgets that may route layers."""

    dense: ModelConfig
    candidates: tuple[int, ...]
    num_experts: int
    budgets: Sequence[float]
    contested: tuple[int, ...] = ()

    def plans(self, fixed: Damage, routed: Damage) -> list[Plan]:
        """The best fixed widths for every budget. A contested budget also gets a mixture with routed layers, if the solver
        prefers any. Every plan counts the routers of all plans, because every policy reads them."""
        experts = self.num_experts
        narrowed = {
            index: [Option(static_rule(0, experts), experts, 0.0)]
            + [Option(static_rule(0, count), count, kl) for count, kl in damage.items()]
            for index, damage in fixed.items()
        }
        mixed = {
            index: options + [Option(routed_rule(0, count, experts), count, kl) for count, kl in routed.get(index, {}).items()]
            for index, options in narrowed.items()
        }
        # First, assume that every contested budget routes every layer. Then solve again with only the chosen routers.
        most = dict.fromkeys(self.candidates, len(self.contested))
        asked = {number: self._solve(number, mixed, most).routed for number in self.contested}
        routers = {index: sum(index in layers for layers in asked.values()) for index in self.candidates}
        plans = [self._solve(number, narrowed, routers) for number in range(len(self.budgets))]
        for number, layers in asked.items():
            mixture = self._solve(number, {i: (mixed if i in layers else narrowed)[i] for i in narrowed}, routers)
            if mixture.routed:
                plans.append(mixture)
        return plans

    def uniform(self) -> list[Plan]:
        """Plans with the same width in every candidate layer."""
        config, plans = self.partitioned(dict.fromkeys(self.candidates, 0)), []
        for number, target in enumerate(self.budgets):
            within = [count for count in range(1, self.num_experts + 1) if _uniform_cost(config, count) <= target]
            width = max(within, default=1)
            depth = range(self.dense.num_hidden_layers)
            plans.append(Plan(number, tuple(width if index in self.candidates else self.num_experts for index in depth)))
        return plans

    def partitioned(self, routers: Mapping[int, int]) -> ModelConfig:
        """The model with exact partitions in the candidate layers. routers: the number of routers in each of these."""
        experts, size = self.num_experts, -(-self.dense.intermediate_size // self.num_experts)
        kind = self.dense.ffn_kind

        def layer(index: int) -> MoeLayerConfig | None:
            if index not in self.candidates:
                return None
            if not routers[index]:
                return MoeLayerConfig(experts, experts, size, expert_weight="one", router="none", ffn_kind=kind)
            count = experts * (1 + routers[index])
            return MoeLayerConfig(count, experts, size, score_function="sigmoid", fixed_experts=experts, ffn_kind=kind)

        return dataclasses.replace(self.dense, layers=tuple(layer(index) for index in range(self.dense.num_hidden_layers)))

    def _solve(self, number: int, options: Mapping[int, Sequence[Option]], routers: Mapping[int, int]) -> Plan:
        rules = best_rules(options, self.partitioned(routers), self.budgets[number])
        routed = tuple(i for i, rule in enumerate(rules) if rule is not None and len(rule.experts or ()) > rule.top_k)
        return Plan(number, tuple(self.num_experts if rule is None else rule.top_k for rule in rules), routed)


def static_rule(first: int, count: int) -> LayerRule:
    """A rule that runs the experts first .. first + count - 1 for every token."""
    return LayerRule(top_k=count, renormalize=False, experts=tuple(range(first, first + count)))


def routed_rule(first: int, count: int, num_experts: int) -> LayerRule:
    """A rule by which the router chooses `count` of the experts first .. first + num_experts - 1."""
    return LayerRule(top_k=count, experts=tuple(range(first, first + num_experts)))


def converted_layers(plans: Sequence[Plan], candidates: Sequence[int], num_experts: int) -> tuple[int, ...]:
    """The layers that at least one plan narrows."""
    return tuple(index for index in candidates if any(plan.widths[index] < num_experts for plan in plans))


def plan_names(plans: Sequence[Plan], budgets: Sequence[float]) -> list[str]:
    """A name for each plan: quality, balanced, further ones by their share, and fast. If a budget has a routed plan, that plan
    gets the name, and the fixed plan gets the name with "-fixed"."""
    names = [NAMED[1], NAMED[2], *(f"active-{100 * target:g}" for target in budgets[2:-1]), NAMED[3]]
    routed = {plan.budget for plan in plans if plan.routed}
    return [names[plan.budget] + "-fixed" * (plan.budget in routed and not plan.routed) for plan in plans]


def plan_policies(
    plans: Sequence[Plan], names: Sequence[str], converted: Sequence[int], num_experts: int, depth: int
) -> dict[str, Rules]:
    """Policy `full` and a policy for each plan, the named ones first. A layer has the exact partition, then the substitutes of
    each fixed plan, then those of each routed plan."""
    full = tuple(static_rule(0, num_experts) if index in converted else None for index in range(depth))
    rules = {name: list(full) for name in names}
    for index in converted:
        first = num_experts
        for routed in (False, True):
            for name, plan in zip(names, plans, strict=True):
                width = plan.widths[index]
                if width == num_experts or (index in plan.routed) != routed:
                    continue
                rules[name][index] = routed_rule(first, width, num_experts) if routed else static_rule(first, width)
                first += num_experts if routed else width
    order = dict.fromkeys((*NAMED[1:], *rules))
    return {"full": full, **{name: tuple(rules[name]) for name in order}}


def _uniform_cost(config: ModelConfig, count: int) -> float:
    return config.active_parameters_ratio(tuple(None if layer is None else float(count) for layer in config.layers))
