"""Every Prometheus metric, declared once, with the names of vLLM where it has them. Base units; prefix `ladimo_`."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from server.engine.messages import ExpertSnapshot, StepStats
from server.engine.request import FinishReason
from server.exposition import BucketRow, Histogram, Row, header, line, series

REQUEST_SECONDS = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50),
    *(60, 120, 240, 480, 960, 1920, 7680),
)
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640),
)
# Fine below 10 ms, where one token of a small model on a GPU lands.
TOKEN_SECONDS = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
STEP_SECONDS = TOKEN_SECONDS
SWAP_SECONDS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)
STEP_TOKENS = tuple(2**n for n in range(15))
REQUEST_TOKENS = tuple(m * 10**e for e in range(5) for m in (1, 2, 5))


PREFIX = "ladimo_"
# Series of one metric that a Prometheus server takes from one process without a thought: what --expert-metrics auto allows the
# counters per expert.
MAX_EXPERT_SERIES = 5000
PHASES = ("prefill", "mixed", "decode")
SWAP_RESULTS = ("ok", "failed")
DIRECTIONS = ("down", "hold", "up")


@dataclass(frozen=True, slots=True)
class Declaration:
    """A metric as it is exported. `name` is without the suffixes _bucket, _sum and _count; `buckets` are upper bounds, empty
    where they depend on the model."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()


EXPERT_TOKENS = Declaration(
    f"{PREFIX}expert_tokens_total",
    "counter",
    "Times an expert was chosen, for the experts that the policy may choose; exported as --expert-metrics says.",
    ("layer", "expert", "policy"),
)
EXPERTS_PER_TOKEN = Declaration(
    f"{PREFIX}layer_experts_per_token", "gauge", "Mean experts a token ran, since start.", ("layer", "policy")
)
DISTINCT_EXPERTS = Declaration(
    f"{PREFIX}layer_distinct_experts_per_step",
    "histogram",
    "Different experts chosen in one step; one bucket per number of experts.",
    ("layer",),
)
LOAD_IMBALANCE = Declaration(
    f"{PREFIX}expert_load_imbalance",
    "gauge",
    "Busiest expert's tokens over the mean of the experts that its policy may choose, since start; 1 is even. Mean over"
    " policies, weighted by their tokens.",
    ("layer",),
)
LOAD_ENTROPY = Declaration(
    f"{PREFIX}expert_load_entropy_ratio",
    "gauge",
    "Entropy of the experts' tokens over that of an even load on the experts that the policy may choose, since start; 1 is"
    " even, 0 is one expert of several. Mean over policies, weighted by their tokens.",
    ("layer",),
)
NEVER_USED = Declaration(
    f"{PREFIX}experts_never_used",
    "gauge",
    "Experts that a policy with traffic may choose and that no token has chosen since start, under any policy.",
    ("layer",),
)
ACTIVE_PARAMETERS = Declaration(
    f"{PREFIX}active_parameters_ratio", "gauge", "Active over dense parameters per token, measured since start.", ("policy",)
)
EXPERT_METRICS = (
    EXPERT_TOKENS,
    EXPERTS_PER_TOKEN,
    DISTINCT_EXPERTS,
    LOAD_IMBALANCE,
    LOAD_ENTROPY,
    NEVER_USED,
    ACTIVE_PARAMETERS,
)


class Metrics:
    """`num_experts`: expert layers and how many experts each has. `active_parameters_ratio`: of experts per token by layer.

    `per_expert`: export a counter per layer, expert and policy; the figures per layer are always exported. Label values known
    in advance begin at 0, so that the first event already counts in a rate.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        num_experts: Mapping[int, int],
        active_parameters_ratio: Callable[[tuple[float | None, ...]], float],
        per_expert: bool = True,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry
        self.declarations: list[Declaration] = []
        self._histograms: list[Histogram] = []
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)

        def declare(
            name: str,
            kind: Literal["counter", "gauge", "histogram"],
            text: str,
            labels: tuple[str, ...],
            buckets: tuple[float, ...] = (),
        ) -> Declaration:
            self.declarations.append(Declaration(PREFIX + name, kind, text, labels, buckets))
            return self.declarations[-1]

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(declare(name, "counter", text, labels).name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(declare(name, "gauge", text, labels).name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            name = declare(name, "histogram", text, labels, buckets).name
            self._histograms.append(Histogram(name, text, buckets, *labels))
            return self._histograms[-1]

        self.requests_in_flight = gauge("requests_in_flight", "Sequences admitted and not yet over, counted at the door.")
        self.requests_running = gauge("requests_running", "Sequences in the running batch, as of the last step.")
        self.requests_waiting = gauge("requests_waiting", "Sequences waiting to be scheduled, as of the last step.")
        self.request_success = counter(
            "request_success_total", "Choices ended, by the finish reason told to the client.", "finish_reason", "policy"
        )
        self.request_failures = counter("request_failures_total", "Requests answered with an error.", "code")
        self.admission_rejections = counter("admission_rejections_total", "Requests not admitted.", "reason")
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of sequences that began to answer.", "policy")
        self.generation_tokens = counter("generation_tokens_total", "Tokens generated.", "policy")
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From submission to the first token.", FIRST_TOKEN_SECONDS, "policy"
        )
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Between two tokens.", TOKEN_SECONDS, "policy")
        self.time_per_output_token = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", TOKEN_SECONDS, "policy"
        )
        self.e2e_latency = histogram(
            "e2e_request_latency_seconds", "From submission to the last token.", REQUEST_SECONDS, "policy"
        )
        self.queue_time = histogram(
            "request_queue_time_seconds", "From submission to the first step.", REQUEST_SECONDS, "policy"
        )
        self.request_prompt_tokens = histogram(
            "request_prompt_tokens", "Prompt tokens of a finished sequence.", REQUEST_TOKENS, "policy"
        )
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "Generated tokens of a finished sequence.", REQUEST_TOKENS, "policy"
        )
        self.kv_cache_usage = gauge("kv_cache_usage_ratio", "Share of KV cache blocks in use, 0 to 1.")
        self.prefix_cache_queries = counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.")
        self.prefix_cache_hits = counter("prefix_cache_hits_total", "Prompt tokens found in the prefix cache.")
        self.preemptions = counter("preemptions_total", "Sequences sent back to the queue for lack of KV blocks.")
        self.step_seconds = histogram("engine_step_seconds", "One engine step.", STEP_SECONDS, "phase")
        self.step_tokens = histogram("step_tokens", "Tokens computed in one step.", STEP_TOKENS)
        self.heartbeat_age = gauge("engine_heartbeat_age_seconds", "Since the engine loop last turned; below 1 while idle.")
        self.graph_replays = counter(
            "cuda_graph_replays_total", "Decode steps replayed from a captured graph, by the rows it has.", "bucket"
        )
        self.graph_misses = counter(
            "cuda_graph_misses_total", "Steps that decoded without a graph although there are some: a prompt was in them."
        )
        self.graph_captures = counter("cuda_graph_captures_total", "Graphs captured: all at start, none later.")
        self.experts = ExpertExposition(num_experts, active_parameters_ratio, per_expert)
        self.declarations.extend(EXPERT_METRICS)
        self.policy_info = gauge("policy_info", "1 for every policy that can be asked for.", "policy", "version", "default")
        self.policy_swaps = counter("policy_swaps_total", "Changes of the default.", "result")
        self.policy_swap_duration = histogram(
            "policy_swap_duration_seconds", "Until the engine had accepted a changed default.", SWAP_SECONDS
        )
        self.policy_requests = counter(
            "policy_requests_total",
            "Requests by what they asked for, what served them, and who chose: body, header, model, tier, auto or default.",
            *("requested", "served", "reason"),
        )
        self.routing_accuracy = gauge("routing_accuracy", "Where the default has the knob, 0 to 1; NaN off the frontier.")
        self.routing_accuracy_floor = gauge(
            "routing_accuracy_floor", "Accuracy that automatic control may not go under; NaN while it is off."
        )
        self.controller_decisions = counter(
            "slo_controller_decisions_total", "Decisions of automatic control, one a second while it is on.", "direction"
        )
        self.build_info = gauge("build_info", "1; the versions that run.", "version", "python", "torch")
        self.model_info = gauge("model_info", "1; the model that is served.", "model", "layers", "expert_layers")
        self._by_policy: tuple[Counter | Histogram, ...] = (
            self.prompt_tokens,
            self.generation_tokens,
            self.time_to_first_token,
            self.inter_token_latency,
            self.time_per_output_token,
            self.e2e_latency,
            self.queue_time,
            self.request_prompt_tokens,
            self.request_generation_tokens,
        )
        for metric, values in (
            (self.step_seconds, PHASES),
            (self.policy_swaps, SWAP_RESULTS),
            (self.controller_decisions, DIRECTIONS),
        ):
            for value in values:
                metric.labels(value)

    def record(self, stats: StepStats) -> None:
        """The one place where engine figures become metrics."""
        self.requests_running.set(stats.running)
        self.requests_waiting.set(stats.waiting)
        self.kv_cache_usage.set(stats.kv_cache_usage_ratio)
        self.preemptions.inc(stats.preemptions)
        self.prefix_cache_queries.inc(stats.prefix_cache_queries)
        self.prefix_cache_hits.inc(stats.prefix_cache_hits)
        self.graph_captures.inc(stats.cuda_graph_captures)
        self.graph_misses.inc(stats.cuda_graph_missed)
        if stats.cuda_graph_bucket is not None:
            self.graph_replays.labels(str(stats.cuda_graph_bucket)).inc()
        tokens = stats.prefill_tokens + stats.decode_tokens
        if tokens:
            phase = "decode" if not stats.prefill_tokens else "mixed" if stats.decode_tokens else "prefill"
            self.step_seconds.labels(phase).observe(stats.seconds)
            self.step_tokens.observe(tokens)
        for policy, seconds in stats.first_token_seconds:
            self.time_to_first_token.labels(policy).observe(seconds)
        for policy, seconds in stats.inter_token_seconds:
            self.inter_token_latency.labels(policy).observe(seconds)
        for policy, count in stats.prompt_tokens.items():
            self.prompt_tokens.labels(policy).inc(count)
        for policy, count in stats.generation_tokens.items():
            self.generation_tokens.labels(policy).inc(count)
        for request in stats.finished:
            self.e2e_latency.labels(request.policy).observe(request.e2e_seconds)
            self.queue_time.labels(request.policy).observe(request.queue_seconds)
            self.request_prompt_tokens.labels(request.policy).observe(request.prompt_tokens)
            self.request_generation_tokens.labels(request.policy).observe(request.generation_tokens)
            first = request.time_to_first_token_seconds
            if first is not None and request.generation_tokens > 1:
                per_token = (request.e2e_seconds - first) / (request.generation_tokens - 1)
                self.time_per_output_token.labels(request.policy).observe(per_token)

    def show_policies(
        self, versions: Mapping[str, str], default: str, accuracy: float | None, floor: float | None = None
    ) -> None:
        """`versions` by policy name; `default` is the policy that requests without a choice run under now; `floor` is automatic
        control's, None while it is off."""
        self.policy_info.clear()
        for name, version in versions.items():
            self.policy_info.labels(name, version, str(name == default).lower()).set(1)
            for metric in self._by_policy:
                metric.labels(name)
            for reason in (*FinishReason, "tool_calls"):  # the door's word for a stop after calls
                self.request_success.labels(str(reason), name)
        self.routing_accuracy.set(math.nan if accuracy is None else accuracy)
        self.routing_accuracy_floor.set(math.nan if floor is None else floor)

    def render(self, snapshot: ExpertSnapshot | None) -> bytes:
        """The exposition text; `snapshot` None repeats the last expert counters."""
        histograms = "".join(histogram.write() for histogram in self._histograms)
        return generate_latest(self.registry) + (histograms + self.experts.write(snapshot)).encode()


class ExpertExposition:
    """Expert figures of the last snapshot, as text. Only expert layers are exported, and under a policy only the experts that
    it may choose; layers and experts are counted from 0.

    They are most of the page, so they do not go through the registry.
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
        self._distinct = {
            layer: BucketRow(DISTINCT_EXPERTS.name, range(experts + 1), layer=str(layer))
            for layer, experts in num_experts.items()
        }

    def write(self, snapshot: ExpertSnapshot | None) -> str:
        """`snapshot` None repeats the last one."""
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
            for layer, experts in self._num_experts.items():
                self._layer(layer, experts, loads, snapshot, lines)
            self._text = self._written(lines)
        return self._text

    def _written(self, lines: Mapping[Declaration, list[str]]) -> str:
        parts: list[str] = []
        for metric in EXPERT_METRICS:
            if self._per_expert or metric is not EXPERT_TOKENS:
                parts.append(header(metric.name, metric.type, metric.help))
                parts += lines.get(metric, ())
        return "".join(parts)

    def _policy(
        self, policy: str, loads: list[list[int]], snapshot: ExpertSnapshot, lines: dict[Declaration, list[str]]
    ) -> None:
        """`loads`: by layer, the counts of the experts that the policy may choose."""
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
        # Each policy is judged by the experts that it may choose: what a mask leaves out on purpose is no imbalance.
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
    """The largest over the mean."""
    return max(load) * len(load) / sum(load)


def _evenness(load: Sequence[int]) -> float:
    """Entropy over that of an even load; 1 where there is no choice."""
    if len(load) == 1:
        return 1.0
    total = sum(load)
    return -sum(count / total * math.log(count / total) for count in load if count) / math.log(len(load))
