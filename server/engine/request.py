"""The nouns of the engine: what a request asks for and what the engine knows of it while it runs."""

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ladimo.policy import RoutingPolicy

# Per expert layer, the experts that one token ran, best first.
TokenExperts = tuple[tuple[int, ...], ...]


class FinishReason(StrEnum):
    """`stop`: end of text or a stop token; `length`: max_tokens or the context is full; `abort`: the client left."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class TokenConstraint(Protocol):
    """A grammar's state after the tokens generated so far; one object per sequence, used by the engine thread only."""

    def allowed_tokens(self) -> NDArray[np.bool_]:
        """Which tokens may come next: [vocab_size], at least one True. End of text is among them once the text is complete."""

    def advance(self, token_id: int) -> None:
        """The token was generated."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Validated at the HTTP edge; the engine asserts.

    temperature 0 is greedy. top_p, top_k and min_p narrow the choice (1.0, 0 and 0.0 = no limit). Draws depend only on `seed`
    and the token's position, never on the rest of the batch; `seed` None draws a fresh one. repetition_penalty looks at prompt
    and answer, the presence and frequency penalties at the answer only. logit_bias: (token id, bias) pairs. logprobs: None for
    none, else how many rivals to report beside each generated token; prompt_logprobs the same for the prompt's tokens. Both are
    of the model's own distribution, before penalties and temperature.
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
    """Which passes' experts a request wants to hear of: those that draw its tokens, or those over its prompt, too."""

    OUTPUT = "output"
    PROMPT = "prompt"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to complete, under the one policy version it keeps until it ends.

    priority: lower runs earlier; equal ones in order of arrival. cache_salt: requests share cached prefixes only under the
    same salt. trace: whether its events tell the experts that ran. flow: for whom it is; where requests wait, flows take turns.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    policy: RoutingPolicy
    priority: int = 0
    cache_salt: str = ""
    trace: Trace | None = None
    flow: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's log-probability, and the `top` most likely tokens of its place with theirs, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """A request inside the engine. Times are `time.monotonic()` seconds.

    `num_computed` counts the tokens whose keys and values are in the cache; everything after them is to be computed. After
    a preemption it is 0 and prompt and output so far are computed again.
    """

    request: GenerationRequest
    policy_row: int  # of the policy table; 0 while the request waits for a row
    seed: int
    arrived: float
    expert_counts: list[int]  # per layer: experts that ran, summed over all computed tokens
    output_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0  # tokens found in the prefix cache when it was last admitted
    num_routed: int = 0  # tokens computed, recomputed ones included: what expert_counts is a sum over
    prompt_experts: list[TokenExperts] = field(default_factory=list)  # of the prompt's tokens but the last, when traced
    num_reached: int = 0  # the most tokens that num_computed has counted
    recomputed: list[int] = field(default_factory=list)  # per preemption, how many of the first tokens were computed again
    charged: bool = False  # its flow has been charged for the prompt
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    @property
    def rank(self) -> tuple[int, float]:
        """Who goes first: smaller before larger."""
        return self.request.priority, self.arrived

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.output_ids)

    def prefix_keys(self, count: int, block_size: int) -> list[bytes]:
        """Keys of the first `count` full blocks: a hash chain over all tokens up to the block's end.

        It begins with the policy version, because hidden states depend on it, and the request's salt.
        """
        while len(self.block_keys) < count:
            index = len(self.block_keys)
            root = f"{self.request.policy.version}\0{self.request.cache_salt}".encode()
            previous = self.block_keys[-1] if index else hashlib.sha256(root).digest()
            tokens = self.token_ids(index * block_size, (index + 1) * block_size)
            self.block_keys.append(hashlib.sha256(previous + np.asarray(tokens, dtype=np.int64).tobytes()).digest())
        return self.block_keys[:count]

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens start..stop of prompt and output together."""
        prompt = self.request.prompt_ids
        if start >= len(prompt):
            return self.output_ids[start - len(prompt) : stop - len(prompt)]
        return [*prompt[start:stop], *self.output_ids[: max(0, stop - len(prompt))]]
