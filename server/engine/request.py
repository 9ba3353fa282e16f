"""Requests: what a client asks for (`GenerationRequest`), and the engine's state of it while it runs (`Sequence`)."""

import hashlib
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ladimo.policy import RoutingPolicy

AGING_SECONDS = 6.0  # one step of priority is worth so much waiting


class TokenRouting(NamedTuple):
    """What one token ran. `experts`: per expert layer, the experts, best first. `refined`: per expert layer, how many neurons
    were read at 8 bits instead of 4, then how many words of the output head; None if the weights are not nested."""

    experts: tuple[tuple[int, ...], ...]
    refined: tuple[int, ...] | None = None


class FinishReason(StrEnum):
    """`stop`: end of text, a stop token or a stop string. `length`: max_tokens or the context length is reached. `abort`: the
    client left."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class TokenConstraint(Protocol):
    """The state of a grammar after the tokens generated so far. One object per sequence, for the engine thread only."""

    def allowed_tokens(self) -> NDArray[np.bool_]:
        """A mask [vocab_size] of the tokens that may come next. At least one is True. A complete text allows end of text."""

    def advance(self, token_id: int) -> None:
        """Go on to the state after this token, which was generated."""


class PhaseWatch(Protocol):
    """Finds the ends of phases in the answer of one sequence. For the engine thread only."""

    def read(self, token_id: int) -> int:
        """Take the next token. Returns how many phases end with it."""


@dataclass(frozen=True, slots=True)
class LaterPhases:
    """The phases of a request after its first one. Each has a policy.

    after_prompt: the second phase begins with the first token of the answer. watch: finds the ends of the other phases; None if
    there are no others.
    """

    policies: tuple[RoutingPolicy, ...]
    after_prompt: bool = False
    watch: PhaseWatch | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The HTTP layer validates the values; the engine only asserts them.

    temperature: 0 takes the most likely token. top_p, top_k, min_p: limits of the draw; 1.0, 0 and 0.0 mean no limit.
    seed: a draw depends only on the seed and the token's position, never on the rest of the batch. None takes a random seed.
    repetition_penalty counts tokens of prompt and answer; presence_penalty and frequency_penalty count those of the answer.
    logit_bias: pairs of a token id and a bias. min_tokens, max_tokens: bounds of the answer's length in tokens.
    logprobs: how many of the most likely tokens to report with each generated token; None reports no log-probabilities.
    prompt_logprobs: the same for the prompt's tokens. Both describe the model's own distribution, before penalties and
    temperature.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    min_p: float = 0.0
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: TokenConstraint | None = None


class Trace(StrEnum):
    """Which routing a request asks to see. OUTPUT: the passes that draw its tokens. PROMPT: those, and the passes over the
    prompt before them."""

    OUTPUT = "output"
    PROMPT = "prompt"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to complete. It keeps its policy versions until it ends.

    policy: of the whole request, or of its first phase.
    later: its other phases; None if it has one policy.
    priority: lower runs earlier. Among equals, flows take turns, and within a flow the oldest goes first.
    cache_salt: only requests with the same salt share cached prefixes.
    trace: for which tokens the events report the routing; None reports none.
    flow: the API key or user that the request counts for (see `FairShare`).
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    policy: RoutingPolicy
    priority: int = 0
    cache_salt: str = ""
    trace: Trace | None = None
    flow: str = ""
    later: LaterPhases | None = None

    @property
    def policies(self) -> tuple[RoutingPolicy, ...]:
        """The policy of each phase, in order. A request without phases has one."""
        return (self.policy,) if self.later is None else (self.policy, *self.later.policies)

    def under(self, policies: tuple[RoutingPolicy, ...]) -> "GenerationRequest":
        """The same request with other policies, one for each phase."""
        assert len(policies) == len(self.policies)
        later = None if self.later is None else replace(self.later, policies=policies[1:])
        return replace(self, policy=policies[0], later=later)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token and its log-probability. `top`: the most likely tokens at its position, best first, as (id, log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """A request inside the engine. Times are in `time.monotonic()` seconds.

    `num_computed` counts the tokens whose keys and values are in the cache. All later tokens are still to be computed. A
    preemption sets it to 0; the prompt and the output so far are then computed again.

    The pass over the token at position p runs under the policy of the phase that p belongs to. `phase_starts` has the position
    at which each phase begins, for the phases that are known to begin.
    """

    request: GenerationRequest
    rows: tuple[int, ...]  # rows of the policy table, one per phase; empty while the request waits for them
    seed: int
    arrived: float
    expert_counts: list[int]  # per layer: number of experts that ran, summed over all computed tokens
    output_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0  # tokens found in the prefix cache at the last admission
    refined_rows: int = 0  # rows of weights that were refined, summed over all computed tokens
    num_routed: int = 0  # tokens that expert_counts sums over: all computed ones, recomputed ones again
    prompt_routing: list[TokenRouting] = field(default_factory=list)  # for a traced prompt, without the last token
    num_reached: int = 0  # the largest value of num_computed so far
    recomputed: list[int] = field(default_factory=list)  # per preemption: how many of the first tokens were computed again
    charged: bool = False  # whether its flow has been charged for the prompt
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    phase_starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        later = self.request.later
        self.phase_starts = [0] if later is None or not later.after_prompt else [0, len(self.request.prompt_ids)]

    @property
    def rank(self) -> float:
        """The sort key of queues: the smallest goes first. It grows with the priority number, and with the time of arrival. So
        a request waits for others of a smaller number only if they came before, or at most AGING_SECONDS later for each step
        between the two numbers."""
        return self.arrived + AGING_SECONDS * self.request.priority

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output together."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    def prefix_keys(self, count: int, block_size: int) -> list[bytes]:
        """Keys of the first `count` full blocks. Each key is a hash of all tokens up to the end of its block.

        The hash also covers the request's salt, and the policy version of each token, because keys and values depend on it.
        """
        while len(self.block_keys) < count:
            index = len(self.block_keys)
            previous = self.block_keys[-1] if index else hashlib.sha256(self.request.cache_salt.encode()).digest()
            begin, end = index * block_size, (index + 1) * block_size
            policies = ",".join(f"{self.request.policies[phase].version} {run}" for phase, run in self.phases(begin, end))
            tokens = np.asarray(self.token_ids(begin, end), dtype=np.int64).tobytes()
            self.block_keys.append(hashlib.sha256(previous + policies.encode() + tokens).digest())
        return self.block_keys[:count]

    def phase(self, position: int) -> int:
        """The number of the phase that a position belongs to."""
        return bisect_right(self.phase_starts, position) - 1

    def phases(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The phases of the positions begin .. end - 1 in order, each with the number of its positions. At least one."""
        runs: list[tuple[int, int]] = []
        while begin < end:
            phase = self.phase(begin)
            stop = min([end, *self.phase_starts[phase + 1 : phase + 2]])
            runs.append((phase, stop - begin))
            begin = stop
        return runs

    @property
    def in_last_phase(self) -> bool:
        """Whether the policy of all further tokens is known."""
        return len(self.phase_starts) == len(self.request.policies)

    def follow_phases(self) -> None:
        """Look for ends of phases in the token that was appended last. Its own pass belongs to the new phase."""
        later = self.request.later
        if later is not None and later.watch is not None and not self.in_last_phase:
            self.phase_starts += [self.num_tokens - 1] * later.watch.read(self.output_ids[-1])

    def trace_prompt(self, count: int, routing: list[TokenRouting]) -> None:
        """Store the routing of the next `count` tokens, except those of the prompt's last token.

        The pass over the prompt's last token draws the first new token, so it belongs to that token's trace.
        """
        begin, end = self.num_computed, self.num_computed + count
        if again := min(end, self.num_reached) - begin:
            if begin == 0:  # a traced prompt never uses the prefix cache, so a recomputation always starts at 0
                self.recomputed.append(0)
            self.recomputed[-1] += again
        self.num_reached = max(self.num_reached, end)
        num_prompt = len(self.request.prompt_ids) - 1
        self.prompt_routing[begin:end] = routing[: max(0, num_prompt - begin)]

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Token ids start .. stop - 1 of the prompt followed by the output."""
        prompt = self.request.prompt_ids
        if start >= len(prompt):
            return self.output_ids[start - len(prompt) : stop - len(prompt)]
        return [*prompt[start:stop], *self.output_ids[: max(0, stop - len(prompt))]]
