"""The object `routing` in answers: under which policies a request ran, and what was measured."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from ladimo.model.config import ModelConfig
from server.engine.request import GenerationRequest
from server.policies.route import Route


class Measured(Protocol):
    """What is known of one choice. `phase_tokens`: the tokens of the answer by number of the phase that drew them."""

    request: GenerationRequest
    completion_tokens: int
    experts_per_token: tuple[float | None, ...]
    refined_rows: float
    phase_tokens: Counter[int]


def routing_object(route: Route, config: ModelConfig, choices: Sequence[Measured]) -> dict[str, Any]:
    """Experts per token, active parameters and bytes are means over all tokens of all choices, prompts included."""
    weights = [len(choice.request.prompt_ids) + choice.completion_tokens for choice in choices]
    measured = tuple(
        None if config.layers[layer] is None else _mean([choice.experts_per_token[layer] for choice in choices], weights)
        for layer in range(config.num_hidden_layers)
    )
    layers = [experts for experts in measured if experts is not None]
    written: dict[str, Any] = {
        "policy": route.policy.name,
        "version": route.policy.version,
        "accuracy": route.accuracy,
        "active_parameters_ratio": config.active_parameters_ratio(measured),
        "experts_per_token": sum(layers) / len(layers) if layers else None,
        "reason": route.reason,
    }
    tokens = [sum(choice.phase_tokens[place] for choice in choices) for place in range(len(route.policies))]
    if config.nested_bits:
        refined = _mean([choice.refined_rows for choice in choices], weights)
        ratios = [policy.bytes_ratio(config, measured, refined) for policy in route.policies]
        written["bytes_ratio"] = _mean(ratios, [sum(weights) - sum(tokens[1:]), *tokens[1:]])  # prompts: the first phase
    if route.phases:
        written["phases"] = [
            {
                "policy": phase.route.policy.name,
                "version": phase.route.policy.version,
                "accuracy": phase.route.accuracy,
                "reason": phase.route.reason,
                "until": phase.until,
                "completion_tokens": count,
            }
            for phase, count in zip(route.phases, tokens, strict=True)
        ]
    return written


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float:
    return sum((value or 0.0) * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
