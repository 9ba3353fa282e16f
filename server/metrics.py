"""Every Prometheus metric, declared once, with the names of vLLM where it has them. Base units; prefix `ladimo_`."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from server.engine.messages import ExpertSnapshot, StepStats

REQUEST_SECONDS = (
    0.01,
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
    7680,
)
FIRST_TOKEN_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
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


class Metrics:
    """`num_experts`: expert layers and how many experts each has. `active_parameters_ratio`: of experts per token by layer."""

    def __init__(
        self,
        registry: CollectorRegistry,
        num_experts: Mapping[int, int],
        active_parameters_ratio: Callable[[tuple[float | None, ...]], float],
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        self.experts = ExpertCollector(num_experts, active_parameters_ratio)
        registry.register(self.experts)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ladimo_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"ladimo_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"ladimo_{name}", text, labels, registry=registry, buckets=buckets)

        self.requests_running = gauge("requests_running", "Sequences in the running batch.")
        self.requests_waiting = gauge("requests_waiting", "Sequences waiting to be scheduled.")
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
        self.preemptions = counter("preemptions_total", "Sequences sent back to the queue for lack of KV blocks.")
        self.step_seconds = histogram("engine_step_seconds", "One engine step.", STEP_SECONDS, "phase")
        self.step_tokens = histogram("step_tokens", "Tokens computed in one step.", STEP_TOKENS)
        self.policy_info = gauge("policy_info", "1 for every policy that can be asked for.", "policy", "version", "default")
        self.policy_swaps = counter("policy_swaps_total", "Changes of the default.", "result")
        self.policy_swap_duration = histogram(
            "policy_swap_duration_seconds", "Until the engine had accepted a changed default.", SWAP_SECONDS
        )
        self.policy_requests = counter(
            "policy_requests_total", "Requests by what they asked for and what served them.", "requested", "served", "reason"
        )
        self.routing_accuracy = gauge("routing_accuracy", "Where the default has the knob, 0 to 1; NaN off the frontier.")
        self.controller_decisions = counter(
            "slo_controller_decisions_total", "Decisions of automatic control, one a second while it is on.", "direction"
        )
        self.build_info = gauge("build_info", "1; the versions that run.", "version", "python", "torch")
        self.model_info = gauge("model_info", "1; the model that is served.", "model", "layers", "expert_layers")

    def record(self, stats: StepStats) -> None:
        """The one place where engine figures become metrics."""
        self.requests_running.set(stats.running)
        self.requests_waiting.set(stats.waiting)
        self.kv_cache_usage.set(stats.kv_cache_usage_ratio)
        self.preemptions.inc(stats.preemptions)
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

    def show_policies(self, versions: Mapping[str, str], default: str, accuracy: float | None) -> None:
        """`versions` by policy name; `default` is the policy that requests without a choice run under now."""
        self.policy_info.clear()
        for name, version in versions.items():
            self.policy_info.labels(name, version, str(name == default).lower()).set(1)
        self.routing_accuracy.set(float("nan") if accuracy is None else accuracy)

    def render(self, snapshot: ExpertSnapshot | None) -> bytes:
        """The exposition text; `snapshot` None repeats the last expert counters."""
        if snapshot is not None:
            self.experts.snapshot = snapshot
        return generate_latest(self.registry)


class ExpertCollector(Collector):
    """Expert figures from the last snapshot. Only expert layers are exported; layers and experts are counted from 0."""

    def __init__(
        self, num_experts: Mapping[int, int], active_parameters_ratio: Callable[[tuple[float | None, ...]], float]
    ) -> None:
        self.snapshot: ExpertSnapshot | None = None
        self._num_experts, self._active_parameters_ratio = num_experts, active_parameters_ratio

    def collect(self) -> Iterable[Metric]:
        tokens = CounterMetricFamily(
            "ladimo_expert_tokens", "Times an expert was chosen.", labels=("layer", "expert", "policy")
        )
        per_token = GaugeMetricFamily("ladimo_layer_experts_per_token", "Mean experts a token ran.", labels=("layer", "policy"))
        distinct = HistogramMetricFamily(
            "ladimo_layer_distinct_experts_per_step", "Different experts chosen in one step.", labels=("layer",)
        )
        imbalance = GaugeMetricFamily(
            "ladimo_expert_load_imbalance", "Busiest expert's tokens over the mean.", labels=("layer",)
        )
        ratio = GaugeMetricFamily(
            "ladimo_active_parameters_ratio", "Active over dense parameters per token, measured.", labels=("policy",)
        )
        if self.snapshot is not None:
            for policy, routed in self.snapshot.routed_tokens.items():
                self._policy(policy, routed, tokens, per_token, ratio)
            for layer, experts in self._num_experts.items():
                self._layer(layer, experts, distinct, imbalance)
        return [tokens, per_token, distinct, imbalance, ratio]

    def _policy(
        self,
        policy: str,
        routed: int,
        tokens: CounterMetricFamily,
        per_token: GaugeMetricFamily,
        ratio: GaugeMetricFamily,
    ) -> None:
        assert self.snapshot is not None
        layers = self.snapshot.expert_tokens.get(policy, [])
        measured: list[float | None] = [None] * len(layers)
        for layer, experts in self._num_experts.items():
            counts = layers[layer][:experts]
            for expert, count in enumerate(counts):
                tokens.add_metric((str(layer), str(expert), policy), count)
            if routed:
                measured[layer] = sum(counts) / routed
                per_token.add_metric((str(layer), policy), sum(counts) / routed)
        if routed:
            ratio.add_metric((policy,), self._active_parameters_ratio(tuple(measured)))

    def _layer(self, layer: int, experts: int, distinct: HistogramMetricFamily, imbalance: GaugeMetricFamily) -> None:
        assert self.snapshot is not None
        steps = self.snapshot.distinct_experts[layer]
        buckets, seen = [], 0
        for number in range(experts + 1):
            seen += steps[number]
            buckets.append((str(float(number)), seen))
        buckets.append(("+Inf", seen))
        distinct.add_metric((str(layer),), buckets, sum(number * count for number, count in enumerate(steps)))
        load = [sum(layers[layer][expert] for layers in self.snapshot.expert_tokens.values()) for expert in range(experts)]
        if any(load):
            imbalance.add_metric((str(layer),), max(load) * experts / sum(load))
