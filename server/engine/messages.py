"""What crosses the border of the engine thread, in both directions. Plain values; no tensor, no asyncio.

Legend: L layers, E experts (the most any layer has).
"""

from dataclasses import dataclass, field

from ladimo.policy import RoutingPolicy
from server.engine.request import FinishReason, GenerationRequest, TokenExperts, TokenLogprobs


class EngineDead(Exception):
    """The engine has stopped, on purpose or by a failed step; nothing will be computed any more."""


class PolicyTableFull(Exception):
    """Policies cannot be made resident: too many rows of the policy table are held by requests."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Start a request. Answered by `TokenEvent`s, the last of which has a finish reason or an error."""

    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request now and free what it holds: its client has left, or (`reason` STOP) its text is complete. No event
    follows. Unknown ids are ignored."""

    request_id: str
    reason: FinishReason = FinishReason.ABORT


@dataclass(frozen=True, slots=True)
class Activate:
    """Make `policies` resident, and no others: the set that stays in the table without a request. Answered by `Activated`.

    Rows of running requests are not touched; policies already resident keep their row.
    """

    call_id: int
    policies: tuple[RoutingPolicy, ...]


@dataclass(frozen=True, slots=True)
class ReadExperts:
    """Copy the expert counters out. Answered by `ExpertSnapshot`."""

    call_id: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the engine loop after the current step."""


Command = Submit | Abort | Activate | ReadExperts | Stop


@dataclass(frozen=True, slots=True)
class RequestStats:
    """A finished request, in seconds and tokens. `experts_per_token` is measured: per layer, None where dense."""

    request_id: str
    policy: str
    finish_reason: FinishReason
    prompt_tokens: int
    generation_tokens: int
    cached_tokens: int
    queue_seconds: float
    time_to_first_token_seconds: float | None
    e2e_seconds: float
    experts_per_token: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """The experts behind generated tokens.

    `tokens`: of the pass that drew each, which is the one over the token before it. `prompt`, on the first event and when asked
    for: of the passes over the prompt's tokens but the last, which drew nothing. So a traced sequence of p prompt and c
    generated tokens has p - 1 + c passes, each told once. `recomputed`, when the prompt is traced: per preemption so far, how
    many of the first passes were run again; the counters of the routing tables count those again, too.
    """

    tokens: tuple[TokenExperts, ...]
    prompt: tuple[TokenExperts, ...] | None = None
    recomputed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token; `finished` on the last. Where the engine has died, `token_id` is None and `error` is set.

    `experts_per_token` is measured over the request so far, prompt included: per layer, None where dense. `logprobs` and, on
    the first event, `prompt_logprobs` (one entry per prompt token, the first None) are there when they were asked for; so is
    `trace`.
    `cached_tokens`: prompt tokens that were found in the prefix cache and not computed again.
    """

    request_id: str
    token_id: int | None
    experts_per_token: tuple[float | None, ...] = ()
    finished: RequestStats | None = None
    error: Exception | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int = 0
    trace: RoutingTrace | None = None


@dataclass(frozen=True, slots=True)
class Activated:
    call_id: int
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class ExpertSnapshot:
    """Running totals since start.

    expert_tokens[policy][layer][expert]: times chosen. reachable[policy][layer]: the experts that any version of the policy
    that was in the table may choose, in rising order; no other is ever chosen. routed_tokens[policy]: tokens computed under it.
    distinct_experts[layer][n]: steps in which exactly n experts of the layer were chosen. Dense layers are all zeros, and no
    expert of theirs is reachable.
    """

    call_id: int
    expert_tokens: dict[str, list[list[int]]]
    reachable: dict[str, list[list[int]]]
    routed_tokens: dict[str, int]
    distinct_experts: list[list[int]]


@dataclass(frozen=True, slots=True)
class StepStats:
    """One engine step. Latencies are (policy name, seconds) per token emitted in the step."""

    seconds: float
    prefill_tokens: int
    decode_tokens: int
    running: int
    waiting: int
    kv_cache_usage_ratio: float
    preemptions: int
    prefix_cache_queries: int = 0  # tokens of admitted sequences that were looked up
    prefix_cache_hits: int = 0  # of these, tokens that were found
    first_token_seconds: list[tuple[str, float]] = field(default_factory=list)
    inter_token_seconds: list[tuple[str, float]] = field(default_factory=list)
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    generation_tokens: dict[str, int] = field(default_factory=dict)
    finished: list[RequestStats] = field(default_factory=list)
    cuda_graph_bucket: int | None = None  # rows of the captured graph that was replayed
    cuda_graph_missed: bool = False  # sequences decoded without a graph although there are some
    cuda_graph_captures: int = 0  # since the step before; the first one tells of those at start


@dataclass(frozen=True, slots=True)
class StepResult:
    """Everything a step hands to the event loop, delivered in one call."""

    events: list[TokenEvent]
    stats: StepStats


Report = StepResult | TokenEvent | Activated | ExpertSnapshot
