"""Prometheus metrics of the experts, made from the engine's counters: load by layer, expert and policy, and its balance."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from server.engine.messages import ExpertSnapshot
from server.exposition import PREFIX, BucketRow, Declaration, Row, header, line, series

EXPERT_TOKENS = Declaration(
    f"{PREFIX}expert_tokens_total",
    "counter",
    "Times that an expert was chosen, for experts that the policy may choose. --expert-metrics says whether it is exported.",
    ("layer", "expert", "policy"),
)
EXPERTS_PER_TOKEN = Declaration(
    f"{PREFIX}layer_experts_per_token",
    "gauge",
    "Mean number of experts that a token ran, since the start.",
    ("layer", "policy"),
)
DISTINCT_EXPERTS = Declaration(
    f"{PREFIX}layer_distinct_experts_per_step",
    "histogram",
    "Number of different experts chosen in one step.",
    ("layer",),
)
LOAD_IMBALANCE = Declaration(
    f"{PREFIX}expert_load_imbalance",
    "gauge",
    "Tokens of the busiest expert divided by the mean over the experts that the policy may choose, since the start; 1 is even."
    " The mean over policies, weighted by their tokens.",
    ("layer",),
)
LOAD_ENTROPY = Declaration(
    f"{PREFIX}expert_load_entropy_ratio",
    "gauge",
    "Entropy of the tokens' distribution over the experts that the policy may choose, divided by that of an even one, since"
    " the start; 1 is even, 0 is one expert of several. The mean over policies, weighted by their tokens.",
    ("layer",),
)
NEVER_USED = Declaration(
    f"{PREFIX}experts_never_used",
    "gauge",
    "Experts that a policy with traffic may choose and that no token has chosen since the start, under any policy.",
    ("layer",),
)
ACTIVE_PARAMETERS = Declaration(
    f"{PREFIX}active_parameters_ratio",
    "gauge",
    "Active parameters per token divided by the dense model's, measured since the start.",
    ("policy",),
)
REFINED = Declaration(
    f"{PREFIX}refined_total",
    "counter",
    "Neurons that were read at 8 bits instead of 4, by layer and group of neighbouring neurons, summed over tokens. Words of"
    " the output head for layer=head. Only of policies that refine. --expert-metrics says whether it is exported.",
    ("layer", "group", "policy"),
)
EXPERT_METRICS = (
    EXPERT_TOKENS,
    REFINED,
    EXPERTS_PER_TOKEN,
    DISTINCT_EXPERTS,
    LOAD_IMBALANCE,
    LOAD_ENTROPY,
    NEVER_USED,
    ACTIVE_PARAMETERS,
)


class ExpertExposition:
    """The expert metrics of the last snapshot, as text in Prometheus's format.

    Only expert layers are exported, and for each policy only the experts that it may choose. Layers and experts are numbered
    from 0. `num_experts`: by layer index, the number of experts of each expert layer. `active_parameters_ratio`: a function of
    the experts per token by layer. `per_expert`: export a counter for each layer, expert and policy.

    These are most of the series of /metrics, so they are written without prometheus_client's registry, which is slower.
    """

    def __init__(
        self,
        num_experts: Mapping[int, int],
        active_parameters_ratio: Callable[[tuple[float | None, ...]], float],
        per_expert: bool,
    ) -> None:
        self._num_experts, self._active_parameters_ratio = num_experts, active_parameters_ratio
        self._per_expert = per_expert
        self._text = self._written({})
        self._rows: dict[tuple[str, int, tuple[int, ...]], Row] = {}
        self._refined_rows: dict[tuple[str, int], Row] = {}
        self._distinct = {
            layer: BucketRow(DISTINCT_EXPERTS.name, range(experts + 1), layer=str(layer))
            for layer, experts in num_experts.items()
        }

    def write(self, snapshot: ExpertSnapshot | None) -> str:
        """The text for this snapshot. None repeats the text of the last one."""
        if snapshot is not None:
            lines: dict[Declaration, list[str]] = {metric: [] for metric in EXPERT_METRICS}
            loads = {
                policy: [
                    [counts[expert] for expert in experts]
                    for counts, experts in zip(layers, snapshot.reachable[policy], strict=True)
                ]
                for policy, layers in snapshot.expert_tokens.items()
            }
            for policy in loads:
                self._policy(policy, loads[policy], snapshot, lines)
            for policy, layers in (snapshot.refined or {}).items():
                if self._per_expert and any(map(any, layers)):
                    lines[REFINED].extend(self._refined(policy, layers))
            for layer, experts in self._num_experts.items():
                self._layer(layer, experts, loads, snapshot, lines)
            self._text = self._written(lines)
        return self._text

    def _written(self, lines: Mapping[Declaration, list[str]]) -> str:
        parts: list[str] = []
        for metric in EXPERT_METRICS:
            if self._per_expert or metric not in (EXPERT_TOKENS, REFINED):
                parts.append(header(metric.name, metric.type, metric.help))
                parts += lines.get(metric, ())
        return "".join(parts)

    def _policy(
        self, policy: str, loads: list[list[int]], snapshot: ExpertSnapshot, lines: dict[Declaration, list[str]]
    ) -> None:
        """Add the lines of one policy. `loads`: by layer, the counts of the experts that the policy may choose."""
        routed = snapshot.routed_tokens.get(policy, 0)
        measured: list[float | None] = [None] * len(loads)
        for layer in self._num_experts:
            if self._per_expert:
                experts = tuple(snapshot.reachable[policy][layer])
                row = self._rows.get((policy, layer, experts))
                if row is None:
                    row = self._rows[policy, layer, experts] = Row(_expert_series(policy, layer, experts))
                lines[EXPERT_TOKENS].append(row.write(loads[layer]))
            if routed:
                measured[layer] = per_token = sum(loads[layer]) / routed
                lines[EXPERTS_PER_TOKEN].append(line(EXPERTS_PER_TOKEN.name, per_token, layer=str(layer), policy=policy))
        if routed:
            lines[ACTIVE_PARAMETERS].append(
                line(ACTIVE_PARAMETERS.name, self._active_parameters_ratio(tuple(measured)), policy=policy)
            )

    def _refined(self, policy: str, layers: list[list[int]]) -> Iterator[str]:
        """The lines of one policy that refines. The last entry of `layers` is the output head's."""
        for place, groups in enumerate(layers):
            layer = str(place) if place < len(layers) - 1 else "head"
            key = (policy, place)
            if key not in self._refined_rows:
                numbers = range(len(groups))
                self._refined_rows[key] = Row(
                    series(REFINED.name, group=str(group), layer=layer, policy=policy) for group in numbers
                )
            yield self._refined_rows[key].write(groups)

    def _layer(
        self,
        layer: int,
        experts: int,
        loads: Mapping[str, list[list[int]]],
        snapshot: ExpertSnapshot,
        lines: dict[Declaration, list[str]],
    ) -> None:
        steps = snapshot.distinct_experts[layer][: experts + 1]
        total = sum(number * count for number, count in enumerate(steps))
        lines[DISTINCT_EXPERTS].append(self._distinct[layer].write_counts([*steps, 0], total))
        # Balance is measured among the experts that a policy may choose. A mask excludes the others on purpose.
        tokens = {policy: snapshot.routed_tokens.get(policy, 0) for policy in loads if any(loads[policy][layer])}
        routed = sum(tokens.values())
        if routed:
            reachable = {expert for policy in tokens for expert in snapshot.reachable[policy][layer]}
            unused = [
                expert for expert in reachable if not any(snapshot.expert_tokens[policy][layer][expert] for policy in tokens)
            ]
            for metric, value in (
                (LOAD_IMBALANCE, sum(n * _imbalance(loads[policy][layer]) for policy, n in tokens.items()) / routed),
                (LOAD_ENTROPY, sum(n * _evenness(loads[policy][layer]) for policy, n in tokens.items()) / routed),
                (NEVER_USED, len(unused)),
            ):
                lines[metric].append(line(metric.name, value, layer=str(layer)))


def _expert_series(policy: str, layer: int, experts: Iterable[int]) -> list[str]:
    return [series(EXPERT_TOKENS.name, expert=str(expert), layer=str(layer), policy=policy) for expert in experts]


def _imbalance(load: Sequence[int]) -> float:
    """The largest count divided by the mean."""
    return max(load) * len(load) / sum(load)


def _evenness(load: Sequence[int]) -> float:
    """The entropy of the load divided by that of an even load; 1 for a single expert."""
    if len(load) == 1:
        return 1.0
    total = sum(load)
    return -sum(count / total * math.log(count / total) for count in load if count) / math.log(len(load))
