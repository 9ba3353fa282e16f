"""From the cost of a multiply-add to that of a policy's prompts, and to the frontier for prompts. Plain numbers, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ladimo.model.config import ModelConfig
from ladimo.model.precision import NESTED_BITS
from ladimo.policy import PREFILL, Frontier, RoutingPolicy, pareto

PROMPT = 512  # tokens of the prompt that the figures are for; its last token alone needs the output head


@dataclass(frozen=True, slots=True)
class FormCosts:
    """The time of a multiply-add of a prompt's step, divided by that with whole weights. Everything else that the step does
    is divided among its multiply-adds.

    bits4, bits8: with weights read at so many bits. refined: what one with a refined row costs beside that at 4 bits.
    processor: where this was measured, with the number of threads. dtype: of the whole weights.
    """

    processor: str
    dtype: str
    bits4: float
    bits8: float
    refined: float

    def of(self, bits: int | None) -> float:
        """With weights read at so many bits; None: whole."""
        if bits is None or bits > max(NESTED_BITS):
            return 1.0
        return self.bits4 if bits <= min(NESTED_BITS) else self.bits8

    def to_dict(self) -> dict[str, Any]:
        """The costs as JSON."""
        return asdict(self)


def prefill_time_ratio(
    policy: RoutingPolicy,
    config: ModelConfig,
    experts_per_token: Sequence[float | None],
    refined_rows: float,
    costs: FormCosts | None,
) -> float:
    """The time of a prompt of PROMPT tokens under the policy, divided by that of the dense model with whole weights.

    Layer i runs experts_per_token[i] experts per token. refined_rows: how many rows of weights a token refines. costs: None if
    all weights have one form. The time is then that of the multiply-adds.
    """

    def cost(bits: int | None) -> float:
        return 1.0 if costs is None else costs.of(config.bits_read(bits))

    head = config.head_parameters / PROMPT
    attention = config.attention_parameters - config.pruned_parameters
    time = config.norm_parameters + cost(policy.head_bits) * head
    for rule, layer, experts in zip(policy.layers, config.layers, experts_per_token, strict=True):
        ffn = (
            config.ffn_parameters if layer is None or experts is None else layer.active_parameters(config.hidden_size, experts)
        )
        attention_bits, bits = (None, None) if rule is None else (rule.attention_bits, rule.bits)
        time += cost(attention_bits) * attention + cost(bits) * ffn
    # Words are refined for the last token only, neurons for all.
    if costs is not None and any(rule is not None and rule.refine is not None for rule in policy.layers):
        time += costs.refined * refined_rows * config.hidden_size
    return time / (config.dense_parameters + head)


def prefill_frontier(
    frontier: Frontier, policies: Mapping[str, RoutingPolicy], config: ModelConfig, costs: FormCosts | None
) -> Frontier:
    """The frontier for prompts: of the measured policies those that no other beats that takes less time for a prompt.

    Raises ValueError if the frontier names a policy that is not there.
    """
    points = {}
    for point in frontier.points:  # a policy has the same figures in each of its points
        policy = policies.get(point.policy)
        if policy is None:
            raise ValueError(f"the frontier names the policy {point.policy!r}, which the checkpoint lacks")
        refined = policy.refined_rows(config, point.experts_per_token, point.bytes_ratio)
        ratio = prefill_time_ratio(policy, config, point.experts_per_token, refined, costs)
        points[point.policy] = replace(point, batch=PREFILL, prefill_time_ratio=ratio)
    kept = pareto(points.values())
    return Frontier(kept, tuple(point for point in points.values() if point not in kept))


def highest_cost(policy: RoutingPolicy, config: ModelConfig, costs: FormCosts | None, prefill: bool) -> float:
    """The cost of a policy without measured figures: the most that it can be, in the unit of `FrontierPoint.cost`. costs,
    prefill: where that is the time of prompts."""
    experts = tuple(None if rule is None else float(rule.top_k) for rule in policy.layers)
    rows = policy.most_refined_rows(config)
    if prefill:
        return prefill_time_ratio(policy, config, experts, rows, costs)
    read = policy.bytes_ratio(config, experts, rows)
    return config.active_parameters_ratio(experts) if read is None else read
