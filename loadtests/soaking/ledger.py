"""What the clients of a soak test saw, and whether the server's counters say the same.

Clients cannot know everything, so two policies keep apart what they cannot know. Requests under LEFT are those whose client
leaves: here only the server's counters are compared with each other. Requests under HIDDEN may draw tokens that the answer does
not show, for example after a stop string: here the server may count more tokens. All other counts must be equal.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

LEFT, HIDDEN = "soak-left", "soak-hidden"
DISCONNECTED = "client_disconnected"  # counted by the server alone
REFUSED = "queue_full"
MAX_SHOWN = 4  # differences that a check shows

Key = tuple[str, ...]


class Counters:
    """The samples of one page of /metrics."""

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def by(self, name: str, *labels: str) -> Counter[Key]:
        """The values of a metric by these labels, summed over its other labels."""
        sums: Counter[Key] = Counter()
        for sample in self._samples:
            if sample.name == name:
                sums[tuple(sample.labels[label] for label in labels)] += sample.value  # type: ignore[assignment]
        return sums

    def total(self, name: str) -> float:
        return self.by(name)[()]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold. `found`: what was measured or, if it failed, what is wrong."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client read of one answer. `requested`: what it asked for, in the terms of `ladimo_policy_requests_total`.

    `prompt_tokens`: those of all choices together. `reasons`: the finish reason of each choice.
    """

    requested: str
    routing: Mapping[str, Any]
    reasons: Sequence[str]
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Ledger:
    """`kinds`: requests by kind. `left`: clients that left; `unsure`: those of them that had not read a status. `unexpected`:
    answers that are wrong in themselves."""

    kinds: Counter[str] = field(default_factory=Counter)
    requests: Counter[Key] = field(default_factory=Counter)
    ended: Counter[Key] = field(default_factory=Counter)
    prompt_tokens: Counter[Key] = field(default_factory=Counter)
    completion_tokens: Counter[Key] = field(default_factory=Counter)
    failures: Counter[Key] = field(default_factory=Counter)
    swaps: int = 0
    left: int = 0
    unsure: int = 0
    unexpected: list[str] = field(default_factory=list)

    def answered(self, answer: Answer) -> None:
        routing = answer.routing
        policy = routing["policy"]
        self.requests[answer.requested, policy, routing["reason"]] += 1
        self.ended.update((reason, policy) for reason in answer.reasons)
        self.prompt_tokens[policy,] += answer.prompt_tokens
        if "phases" in routing:
            for phase in routing["phases"]:
                self.completion_tokens[phase["policy"],] += phase["completion_tokens"]
        else:
            self.completion_tokens[policy,] += answer.completion_tokens

    def started_and_failed(self, requested: str, policy: str, reason: str, code: str) -> None:
        """The request had begun when it failed."""
        self.requests[requested, policy, reason] += 1
        self.failures[code,] += 1

    def checks(self, before: Counters, after: Counters) -> list[Check]:
        """Compare with what the server has counted between two readings."""

        def rise(name: str, *labels: str) -> Counter[Key]:
            counted, earlier = after.by(f"ladimo_{name}", *labels), before.by(f"ladimo_{name}", *labels)
            return Counter({key: value for key in counted if (value := int(counted[key] - earlier[key]))})

        requests = rise("policy_requests_total", "requested", "served", "reason")
        ended = rise("request_success_total", "finish_reason", "policy")
        failures = rise("request_failures_total", "code")
        left_begun = sum(count for (_, served, _), count in requests.items() if served == LEFT)
        left_ended = sum(count for (_, policy), count in ended.items() if policy == LEFT)
        swaps = rise("policy_swaps_total", "result")
        return [
            _equal("requests by what was asked, policy and reason", self.requests, _without(requests, LEFT)),
            _equal("answers by finish reason and policy", self.ended, _without(ended, LEFT)),
            _equal("prompt tokens by policy", self.prompt_tokens, rise("prompt_tokens_total", "policy"), [HIDDEN]),
            _equal("generated tokens by policy", self.completion_tokens, rise("generation_tokens_total", "policy"), [HIDDEN]),
            self._failures("errors by code", failures),
            self._failures("refusals by reason", rise("admission_rejections_total", "reason"), only=REFUSED),
            Check(
                "requests of clients that left",
                left_begun == left_ended <= self.left,
                f"{self.left} left, {left_begun} of them had begun, {left_ended} ended",
            ),
            _equal("swaps of the default", Counter({("ok",): self.swaps}), swaps),
        ]

    def _failures(self, name: str, counted: Counter[Key], only: str | None = None) -> Check:
        """A client that left without a status may have been refused, and then only the server knows."""
        seen = Counter({key: count for key, count in self.failures.items() if only in (None, *key)})
        more = counted[REFUSED,] - seen[REFUSED,]
        if 0 < more <= self.unsure:
            seen[REFUSED,] += more
        return _equal(name, seen, _without(counted, DISCONNECTED))


def at_rest(after: Counters) -> Check:
    """Whether nothing is left of the requests in the server."""
    names = ("requests_in_flight", "requests_running", "requests_waiting", "kv_cache_usage_ratio")
    left = {name: value for name in names if (value := after.total(f"ladimo_{name}"))}
    return Check("queue, batch and KV blocks are empty", not left, ", ".join(f"{n} {v:g}" for n, v in left.items()) or "0")


def _without(counted: Counter[Key], label: str) -> Counter[Key]:
    return Counter({key: count for key, count in counted.items() if label not in key})


def _equal(name: str, clients: Counter[Key], server: Counter[Key], at_least: Sequence[str] = ()) -> Check:
    """`at_least`: policies under which the server may count more. The policy LEFT is left out."""
    wrong = []
    for key in sorted({*clients, *server}):
        fewer = server[key] < clients[key] if key[-1] in at_least else server[key] != clients[key]
        if fewer and key[-1] != LEFT:
            wrong.append(f"{'/'.join(key)}: clients {clients[key]}, server {server[key]}")
    more = f" and {len(wrong) - MAX_SHOWN} more" if len(wrong) > MAX_SHOWN else ""
    return Check(name, not wrong, "; ".join(wrong[:MAX_SHOWN]) + more if wrong else f"{sum(clients.values())}")
