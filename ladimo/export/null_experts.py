"""Unequal numbers of experts in model types that have one number for all layers: null experts.

The model type must have sigmoid scores and a selection bias, which counts in the choice and not in the weight. A null expert
has weights of zero. With the bias ALWAYS it takes one of the places of every token. With NEVER it takes none. So a layer in
which null experts take 2 of 6 places runs the 4 best of its own. A pinned expert is a real one with the bias ALWAYS. Its router
row is zero, so its score is 0.5, and its down projection is doubled.

Legend: D hidden_size, E experts of the written model type.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ladimo.export.hugging_face import Tensors, expert_tensors, expert_width, routed_layers
from ladimo.export.layer_forms import RoutedExperts
from ladimo.export.policy_view import PolicyView, padded

ALWAYS, NEVER = 100.0, -100.0  # far beyond any score, which is between 0 and 1


@dataclass(frozen=True, slots=True)
class Places:
    """What all layers of the written model have in common.

    num_experts: E, null experts included. top_k: experts per token, null experts included. width: neurons of an expert.
    normalised: whether weights are divided by their sum.
    """

    num_experts: int
    top_k: int
    width: int
    normalised: bool


def fit_places(view: PolicyView, pinned: Callable[[RoutedExperts], tuple[int, ...]], layers: list[int]) -> Places:
    """The fewest places that hold every layer of `layers`; those that do not route hold null experts alone.

    `pinned`: the experts of a routed layer that run for every token and get a place. Raises ValueError for softmax scores, and
    for normalised weights in layers that would need null experts.
    """
    routed = routed_layers(view)
    for layer, form in routed.items():
        if form.score_function != "sigmoid":
            raise ValueError(f"{view.name(layer)}: scores by {form.score_function}, the target by sigmoid")
    normalised = {form.normalised for form in routed.values()}
    needed = {layer: len(pinned(form)) + form.top_k for layer, form in routed.items()}
    top_k = max(needed.values())
    if len(normalised) > 1:
        raise ValueError(f"policy {view.policy.name!r}: divides weights by their sum in some layers only")
    if True in normalised and (len(set(needed.values())) > 1 or any(pinned(form) for form in routed.values())):
        raise ValueError(
            f"policy {view.policy.name!r}: divides weights by their sum, and layers run unequal numbers of experts; the null "
            "experts that make them equal would count in the sum"
        )
    held = {layer: len(pinned(form)) + len(form.choices) + top_k - needed[layer] for layer, form in routed.items()}
    num_experts = max([*held.values(), *(top_k for layer in layers if layer not in routed), 2])
    return Places(num_experts, top_k, expert_width(view), normalised.pop())


def placed_experts(view: PolicyView, layer: int, pinned: tuple[int, ...], places: Places, prefix: str) -> Tensors:
    """Yield the router, its bias and the experts of one layer: those that it chooses from, the pinned ones, null experts."""
    form = view.routed.get(layer)
    choices, top_k = (form.choices, form.top_k) if form else ((), 0)
    real = (*choices, *pinned)
    num_experts, width, hidden_size = places.num_experts, places.width, view.source.hidden_size
    router = torch.zeros(num_experts, hidden_size, dtype=view.dtype)
    bias = torch.full((num_experts,), NEVER)
    gate, up = (torch.zeros(num_experts, width, hidden_size, dtype=view.dtype) for _ in range(2))
    down = torch.zeros(num_experts, hidden_size, width, dtype=view.dtype)
    if form:
        router[: len(choices)] = view.router(layer, choices)
        bias[: len(choices)] = view.selection_bias(layer)[list(choices)] if form.selection_bias else 0.0
        for target, weights in zip((gate, up, down), padded(*view.experts(layer, real), width), strict=True):
            target[: len(real)] = weights
        down[len(choices) : len(real)] *= 2
    taken = places.top_k - top_k
    bias[len(choices) : len(choices) + taken] = ALWAYS
    yield f"{prefix}gate.weight", router
    yield f"{prefix}gate.e_score_correction_bias", bias
    yield from expert_tensors(prefix, (gate, up, down))
