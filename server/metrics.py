"""All Prometheus metrics, each declared once. Names follow vLLM where it has the same metric. Base units; prefix `ladimo_`."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from server.engine.messages import ExpertSnapshot, Replayed, StepStats
from server.engine.request import FinishReason
from server.expert_metrics import EXPERT_METRICS, ExpertExposition
from server.exposition import PREFIX, Declaration, Histogram

REQUEST_SECONDS = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50),
    *(60, 120, 240, 480, 960, 1920, 7680),
)
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640),
)
# Fine steps below 10 ms, which is the time per token of a small model on a GPU.
TOKEN_SECONDS = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
STEP_SECONDS = TOKEN_SECONDS
SWAP_SECONDS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)
STEP_TOKENS = tuple(2**n for n in range(15))
REQUEST_TOKENS = tuple(m * 10**e for e in range(5) for m in (1, 2, 5))


# --expert-metrics auto exports the counters per expert only up to this many series. A Prometheus server handles this many
# series of one metric from one process easily.
MAX_EXPERT_SERIES = 5000
PHASES = ("prefill", "mixed", "decode")
SWAP_RESULTS = ("ok", "failed")
DIRECTIONS = ("down", "hold", "up")
SIGNALS = ("wait", "queue", "token", "ttft", "itl")  # what automatic control looks at
CHANGE_CAUSES = {"down": SIGNALS, "up": ("floor", "room")}


class Metrics:
    """All metrics of the server. `declarations` describes them, for the generated page.

    `num_experts`: by layer index, the number of experts of each expert layer. `active_parameters_ratio`: a function of the
    experts per token by layer. `per_expert`: export a counter per layer, expert and policy; figures per layer are always
    exported. Series with known label values start at 0, so that a rate counts the first event.
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

        self.requests_in_flight = gauge("requests_in_flight", "Sequences admitted and not finished, counted by the HTTP layer.")
        self.requests_running = gauge("requests_running", "Sequences in the running batch at the last step.")
        self.requests_waiting = gauge("requests_waiting", "Sequences waiting to be scheduled at the last step.")
        self.request_success = counter(
            "request_success_total", "Choices that ended, by the finish reason in the answer.", "finish_reason", "policy"
        )
        self.request_failures = counter("request_failures_total", "Requests answered with an error.", "code")
        self.admission_rejections = counter(
            "admission_rejections_total", "Requests that were refused before they began.", "reason"
        )
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of sequences that have their first token.", "policy")
        self.generation_tokens = counter("generation_tokens_total", "Tokens generated.", "policy")
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "Time from submission to the first token.", FIRST_TOKEN_SECONDS, "policy"
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Time between two tokens of a sequence.", TOKEN_SECONDS, "policy"
        )
        self.time_per_output_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token of a sequence, without the first.",
            TOKEN_SECONDS,
            "policy",
        )
        self.e2e_latency = histogram(
            "e2e_request_latency_seconds", "Time from submission to the last token.", REQUEST_SECONDS, "policy"
        )
        self.queue_time = histogram(
            "request_queue_time_seconds", "Time from submission to the first step.", REQUEST_SECONDS, "policy"
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
        self.preemptions = counter("preemptions_total", "Sequences sent back to the queue because KV blocks ran out.")
        self.step_seconds = histogram("engine_step_seconds", "Duration of one engine step.", STEP_SECONDS, "phase")
        self.step_tokens = histogram("step_tokens", "Tokens computed in one step.", STEP_TOKENS)
        self.prompt_limit = gauge(
            "step_prompt_tokens_limit",
            "Prompt tokens that a step may compute beside what decodes in it. --max-step-tokens auto chooses them.",
        )
        self.weight_bytes = counter(
            "weight_bytes_total",
            "Bytes of nested weights that steps read, output head included. A step reads each plane once for all its tokens.",
        )
        self.heartbeat_age = gauge("engine_heartbeat_age_seconds", "Time since the engine loop last ran; below 1 when idle.")
        self.graph_replays = counter(
            "cuda_graph_replays_total", "Decode steps replayed from a CUDA graph, by its number of rows.", "bucket"
        )
        self.graph_misses = counter(
            "cuda_graph_misses_total", "Steps that decoded without a CUDA graph because a prompt was in them."
        )
        self.graph_captures = counter("cuda_graph_captures_total", "CUDA graphs captured. All are captured at the start.")
        self.experts = ExpertExposition(num_experts, active_parameters_ratio, per_expert)
        self.declarations.extend(EXPERT_METRICS)
        self.policy_info = gauge(
            "policy_info", "Always 1; one series for each policy that requests can name.", "policy", "version", "default"
        )
        self.policy_swaps = counter("policy_swaps_total", "Attempts to change the default policy.", "result")
        self.policy_swap_duration = histogram(
            "policy_swap_duration_seconds", "Time until the engine has accepted a changed default.", SWAP_SECONDS
        )
        self.policy_requests = counter(
            "policy_requests_total",
            "Requests by what they asked for, what served them, and what decided: body, header, model, tier, canary, auto, "
            "queue, deadline, default.",
            *("requested", "served", "reason"),
        )
        self.routing_accuracy = gauge("routing_accuracy", "Accuracy of the default, 0 to 1; NaN if it is not on the frontier.")
        self.routing_accuracy_floor = gauge(
            "routing_accuracy_floor", "Lowest accuracy that automatic control may set; NaN while it is off."
        )
        self.canary_share = gauge(
            "canary_share",
            "Share that the canary takes of the requests that leave the choice to the server; 0: no canary.",
        )
        self.shadow_answers = counter(
            "shadow_answers_total", "Finished answers that were computed again under accuracy 1.", "policy"
        )
        self.shadow_tokens = counter("shadow_tokens_total", "Tokens of these answers.", "policy")
        self.shadow_agreeing_tokens = counter(
            "shadow_agreeing_tokens_total",
            "Tokens of these answers at which the policy has the same most likely token as accuracy 1.",
            "policy",
        )
        self.shadow_kl_nats = counter(
            "shadow_kl_nats_total", "KL divergence of the policy from accuracy 1, summed over these tokens.", "policy"
        )
        self.controller_decisions = counter(
            "slo_controller_decisions_total", "Decisions of automatic control, two per second while it is on.", "direction"
        )
        self.controller_changes = counter(
            "slo_controller_changes_total",
            "Changes of the accuracy by automatic control, and what decided: wait, queue or token (a forecast), ttft or itl "
            "(measured), floor, room.",
            *("direction", "cause"),
        )
        self.controller_signals = gauge(
            "slo_controller_signal_ratio",
            "What automatic control looks at, each over its target; above 1 the accuracy falls. NaN while there is none.",
            "signal",
        )
        self.build_info = gauge("build_info", "Always 1; the labels are the versions that run.", "version", "python", "torch")
        self.model_info = gauge(
            "model_info", "Always 1; the labels describe the served model.", "model", "layers", "expert_layers"
        )
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
            self.shadow_answers,
            self.shadow_tokens,
            self.shadow_agreeing_tokens,
            self.shadow_kl_nats,
        )
        for metric, values in (
            (self.step_seconds, PHASES),
            (self.policy_swaps, SWAP_RESULTS),
            (self.controller_decisions, DIRECTIONS),
        ):
            for value in values:
                metric.labels(value)
        for direction, causes in CHANGE_CAUSES.items():
            for cause in causes:
                self.controller_changes.labels(direction, cause)
        self.show_signals({})

    def record(self, stats: StepStats) -> None:
        """Add the statistics of one engine step to the metrics."""
        self.requests_running.set(stats.running)
        self.requests_waiting.set(stats.waiting)
        self.kv_cache_usage.set(stats.kv_cache_usage_ratio)
        self.prompt_limit.set(stats.prompt_limit)
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
            self.weight_bytes.inc(stats.weight_bytes)
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

    def record_replay(self, replayed: Replayed) -> None:
        """Add the result of a replay to the metrics."""
        self.shadow_answers.labels(replayed.policy).inc()
        self.shadow_tokens.labels(replayed.policy).inc(replayed.tokens)
        self.shadow_agreeing_tokens.labels(replayed.policy).inc(replayed.agreeing)
        self.shadow_kl_nats.labels(replayed.policy).inc(replayed.kl)

    def show_signals(self, signals: Mapping[str, float]) -> None:
        """Show the signals of automatic control, each over its target."""
        for signal in SIGNALS:
            self.controller_signals.labels(signal).set(signals.get(signal, math.nan))

    def show_policies(
        self, versions: Mapping[str, str], default: str, accuracy: float | None, floor: float | None = None
    ) -> None:
        """Show the current policies and the default.

        `versions`: the version of each policy by name. `default`: the policy of requests that do not choose. `accuracy`: the
        default's; None if it is not on the frontier. `floor`: the lowest accuracy of automatic control; None while it is off.
        """
        self.policy_info.clear()
        for name, version in versions.items():
            self.policy_info.labels(name, version, str(name == default).lower()).set(1)
            for metric in self._by_policy:
                metric.labels(name)
            for reason in (*FinishReason, "tool_calls"):  # the finish reason of an answer with tool calls
                self.request_success.labels(str(reason), name)
        self.routing_accuracy.set(math.nan if accuracy is None else accuracy)
        self.routing_accuracy_floor.set(math.nan if floor is None else floor)

    def render(self, snapshot: ExpertSnapshot | None) -> bytes:
        """The text of /metrics. `snapshot` None repeats the last expert metrics."""
        histograms = "".join(histogram.write() for histogram in self._histograms)
        return generate_latest(self.registry) + (histograms + self.experts.write(snapshot)).encode()
