"""What one layer computes under a rule, in terms that other programs have: fixed experts, or experts chosen by token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ladimo.model.config import MoeLayerConfig, ScoreFunction
from ladimo.model.router import FixedOrder
from ladimo.model.routing import select_experts
from ladimo.policy import LayerRule, RoutingPolicy


@dataclass(frozen=True, slots=True)
class FixedExperts:
    """The experts that a layer runs for every token, and the weight of each of them."""

    experts: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """A layer whose router chooses by token.

    always: experts that run for every token with weight 1. choices: the experts that the router chooses from. top_k: how many
    of them run. normalised: whether the weights of the chosen experts are divided by their sum. selection_bias: whether a bias
    changes the order of the experts. shared_width: the neurons of a shared expert with a gate of its own, 0 for none.
    """

    always: tuple[int, ...]
    choices: tuple[int, ...]
    top_k: int
    score_function: ScoreFunction
    normalised: bool
    selection_bias: bool
    shared_width: int = 0

    def __str__(self) -> str:
        return f"chooses {self.top_k} of {len(self.choices)} experts by token"


def layer_form(rule: LayerRule, layer: MoeLayerConfig, selection_bias: Callable[[], Tensor]) -> FixedExperts | RoutedExperts:
    """What the layer computes under the rule. `selection_bias` reads the router's bias [E], if the layer has one.

    Raises ValueError if the layer does what no other program can: a number of experts that depends on the token, weights of
    another form, or a router that is not linear.
    """
    allowed = tuple(range(layer.num_experts)) if rule.experts is None else rule.experts
    top_k = min(rule.top_k, len(allowed))
    _check_limits(rule, layer, top_k, len(allowed))
    shared_width = layer.shared_expert_intermediate_size
    if shared_width and (layer.router != "linear" or layer.expert_weight == "one" or layer.fixed_experts):
        raise ValueError("has a shared expert beside experts that are not routed, or not weighted, as in Qwen2-MoE")
    if layer.router == "none":
        return _in_order(rule, layer, selection_bias() if layer.selection_bias else None)
    always = tuple(expert for expert in allowed if expert < layer.fixed_experts)
    if always:
        return _beside_fixed(rule, layer, always, allowed[len(always) :], top_k)
    whole = top_k == len(allowed)
    if layer.expert_weight == "one":
        if whole:
            return FixedExperts(allowed, (1 / top_k if rule.renormalize else 1.0,) * top_k)
        if top_k > 1:
            raise ValueError(f"chooses {top_k} of {len(allowed)} experts by token and weighs them all alike")
        normalised = True  # the weight of a single expert is then 1
    else:
        # The number of best scores that sum to 1; None for plain sigmoid scores.
        summed = len(allowed) if layer.score_function == "softmax" else None
        if layer.score_norm_top_k is not None:
            summed = min(layer.score_norm_top_k, len(allowed))
        normalised = rule.renormalize or summed == top_k
        plain = summed == (len(allowed) if layer.score_function == "softmax" else None)
        if not normalised and not plain:
            raise ValueError(f"weighs its best {top_k} by scores that are divided by the sum of the best {summed}")
    if normalised and len(allowed) == 1 and not shared_width:
        return FixedExperts(allowed, (1.0,))
    _check_linear(layer)
    return RoutedExperts((), allowed, top_k, layer.score_function, normalised, layer.selection_bias, shared_width)


def _check_limits(rule: LayerRule, layer: MoeLayerConfig, top_k: int, num_allowed: int) -> None:
    """Raises ValueError if the number of experts can depend on the token or on its batch. The best expert is always kept."""
    limits = dict(rule.limits)
    budget = limits.pop("batch_experts", None)
    found = list(limits) if top_k > 1 and layer.router != "none" else []
    if budget is not None and num_allowed > 1 and not (layer.router == "none" and budget >= top_k):
        found.append("batch_experts")
    if found:
        raise ValueError(f"{' and '.join(found)} may drop experts of a token")


def _in_order(rule: LayerRule, layer: MoeLayerConfig, selection_bias: Tensor | None) -> FixedExperts:
    """Without a router every token gets the same choice. The engine's own rule makes it."""
    rows, allowed = RoutingPolicy("layer", "", (rule,)).to_rows(layer.num_experts)
    logits = FixedOrder(0, layer)(torch.zeros(1, 0))
    weights, ids = select_experts(logits, torch.tensor(rows[:1]), torch.tensor(allowed), layer, selection_bias)
    kept = sorted((expert, weight) for expert, weight in zip(ids[0].tolist(), weights[0].tolist(), strict=True) if expert >= 0)
    return FixedExperts(tuple(expert for expert, _ in kept), tuple(weight for _, weight in kept))


def _beside_fixed(
    rule: LayerRule, layer: MoeLayerConfig, always: tuple[int, ...], choices: tuple[int, ...], top_k: int
) -> FixedExperts | RoutedExperts:
    """A layer with fixed experts. They score 1, so they come before all others."""
    if layer.selection_bias or layer.score_norm_top_k is not None:
        raise ValueError("has fixed experts and also a selection bias or divided scores")
    if top_k <= len(always):
        return FixedExperts(always[:top_k], (1 / top_k if rule.renormalize else 1.0,) * top_k)
    if rule.renormalize or layer.expert_weight == "one":
        raise ValueError("weighs fixed experts together with those that it chooses by token")
    _check_linear(layer)
    return RoutedExperts(always, choices, top_k - len(always), layer.score_function, False, False)


def _check_linear(layer: MoeLayerConfig) -> None:
    if layer.router != "linear":
        raise ValueError(f"its router is of the kind {layer.router!r}, and other programs have only linear routers")
