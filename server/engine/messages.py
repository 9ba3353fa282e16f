"""The messages between the engine thread and the event loop: commands in, reports out.

They are plain values without tensors. "Per layer" means one entry for every layer of the model, in order.
"""

from dataclasses import dataclass, field

from ladimo.policy import RoutingPolicy
from server.engine.request import FinishReason, GenerationRequest, TokenLogprobs, TokenRouting


class EngineDead(Exception):
    """The engine does not run: it is still loading, it was stopped, or a step failed."""


class PolicyTableFull(Exception):
    """There are too few free rows in the policy table to make the policies resident."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Start a request. The replies are `TokenEvent`s. The last one has `finished` or `error` set."""

    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request now and free its blocks and its row. No event follows. Unknown ids are ignored.

    `reason` is ABORT if the client has left, and STOP if a stop string has completed the text.
    """

    request_id: str
    reason: FinishReason = FinishReason.ABORT


@dataclass(frozen=True, slots=True)
class Rebinding:
    """Other policies for sequences that belong together: one for each of their phases."""

    request_ids: tuple[str, ...]
    policies: tuple[RoutingPolicy, ...]


@dataclass(frozen=True, slots=True)
class Rebind:
    """Give requests that have not begun to run other policies. The reply is `Rebound`, before any event of these requests.

    Sequences that belong together change together, and so do their phases. If one of them has begun, or has not come yet, or if
    a policy gets no row of the table now, all of them keep their policies.
    """

    changes: tuple[Rebinding, ...]


@dataclass(frozen=True, slots=True)
class Activate:
    """Make exactly these policies resident. The reply is `Activated`.

    A resident policy keeps its row even when no request uses it. Rows of running requests do not change.
    """

    call_id: int
    policies: tuple[RoutingPolicy, ...]


@dataclass(frozen=True, slots=True)
class ReadExperts:
    """Read the expert counters. The reply is an `ExpertSnapshot`."""

    call_id: int


@dataclass(frozen=True, slots=True)
class Replay:
    """Compute a finished answer again under its own policy and under `reference`, when there is nothing else to do.

    The reply is `Replayed`. There is none if too many answers wait for their replay. `output_ids` is not empty.
    """

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    policy: RoutingPolicy
    reference: RoutingPolicy


@dataclass(frozen=True, slots=True)
class Stop:
    """End the engine loop after the current step."""


Command = Submit | Abort | Rebind | Activate | ReadExperts | Replay | Stop


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Statistics of a finished request: times in seconds, lengths in tokens.

    `experts_per_token` is the measured mean per layer, None for a dense layer. `cached_tokens` counts prompt tokens that were
    found in the prefix cache. `queue_seconds` lasts from arrival to the first step.
    """

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
    """What ran for generated tokens, and on request for the prompt.

    The pass over one token draws the next token. `tokens` has one entry per generated token: the routing of the pass that drew
    it. `prompt` has the routing of all passes before the first draw, which is one for each prompt token but the last. It comes
    with the first event, if the request asked for it. So p prompt tokens and c generated tokens give p - 1 + c passes, and
    each pass appears once.

    `recomputed` has one entry per preemption so far: how many of the first passes ran again. It is filled only if the prompt is
    traced. The expert counters count such passes again, too.
    """

    tokens: tuple[TokenRouting, ...]
    prompt: tuple[TokenRouting, ...] | None = None
    recomputed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token. The last event of a request has `finished`. If the engine has died, `token_id` is None and `error`
    is set.

    `experts_per_token` is the measured mean per layer over the request so far, prompt included; None for a dense layer.
    `phase` is the number of the phase whose policy drew the token.
    `refined_rows` is the mean number of rows of weights that a token refined (`inputs.refined_rows`). `logprobs`,
    `prompt_logprobs` and `trace` are set only if the request asked for them. `prompt_logprobs` comes with the first event: one
    entry per prompt token, the first of them None. `cached_tokens` counts prompt tokens that were found in the prefix cache and
    not computed again.
    """

    request_id: str
    token_id: int | None
    experts_per_token: tuple[float | None, ...] = ()
    phase: int = 0
    refined_rows: float = 0.0
    finished: RequestStats | None = None
    error: Exception | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int = 0
    trace: RoutingTrace | None = None


@dataclass(frozen=True, slots=True)
class Activated:
    """The reply to `Activate`. `error` None: the policies are resident now."""

    call_id: int
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Rebound:
    """The reply to `Rebind`: whether each of its changes was made, in its order."""

    changed: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class ExpertSnapshot:
    """Expert counters since the start. Policies are given by name.

    expert_tokens[policy][layer][expert]: how often the expert was chosen.
    reachable[policy][layer]: the experts that the policy may choose, in rising order. All versions of the policy that were in
    the table count.
    routed_tokens[policy]: tokens computed under the policy.
    distinct_experts[layer][n]: steps in which exactly n different experts of the layer ran.
    A dense layer has zeros everywhere and no reachable experts.
    refined[policy][layer][group]: how many neurons of the group were read at 8 bits instead of 4, summed over tokens; of the
    last entry, how many words of the output head. None if the weights are not nested (`ladimo.model.nested.refinement`).
    """

    call_id: int
    expert_tokens: dict[str, list[list[int]]]
    reachable: dict[str, list[list[int]]]
    routed_tokens: dict[str, int]
    distinct_experts: list[list[int]]
    refined: dict[str, list[list[int]]] | None = None


@dataclass(frozen=True, slots=True)
class StepStats:
    """Statistics of one engine step.

    Each list of latencies has one pair (policy name, seconds) for every token that the step produced.

    interval_seconds: the time since the end of the step before, or since the step's start if the engine was idle in between.
    prompt_limit: how many prompt tokens the step, or the last one before it that could have any, could have.
    decode_rows: sequences that decoded, by policy name. prefilled_tokens: prompt tokens that were computed, by policy name.
    """

    seconds: float
    prefill_tokens: int
    decode_tokens: int
    running: int
    waiting: int
    kv_cache_usage_ratio: float
    preemptions: int
    prompt_limit: int = 0
    weight_bytes: float = 0.0  # that the step read, see `WeightBytes`; 0 if the weights are not nested
    prefix_cache_queries: int = 0  # tokens of admitted sequences that were looked up in the prefix cache
    prefix_cache_hits: int = 0  # how many of these tokens were found
    first_token_seconds: list[tuple[str, float]] = field(default_factory=list)
    inter_token_seconds: list[tuple[str, float]] = field(default_factory=list)
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    generation_tokens: dict[str, int] = field(default_factory=dict)
    finished: list[RequestStats] = field(default_factory=list)
    cuda_graph_bucket: int | None = None  # rows of the graph that was replayed; None: no graph
    cuda_graph_missed: bool = False  # the step decoded without a graph although graphs exist
    cuda_graph_captures: int = 0  # new since the step before; the first step reports those captured at the start
    interval_seconds: float = 0.0
    decode_rows: dict[str, int] = field(default_factory=dict)
    prefilled_tokens: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepResult:
    """All results of one step. They are delivered to the event loop in one call."""

    events: list[TokenEvent]
    stats: StepStats


@dataclass(frozen=True, slots=True)
class Replayed:
    """How far a policy agrees with the reference on one answer of `tokens` tokens.

    `agreeing`: the number of tokens at which both have the same most likely token. `kl`: the KL divergence of the policy from
    the reference in nats, summed over the tokens.
    """

    policy: str
    version: str
    tokens: int
    agreeing: int
    kl: float


Report = StepResult | TokenEvent | Rebound | Activated | ExpertSnapshot | Replayed
