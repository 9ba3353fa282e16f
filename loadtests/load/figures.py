"""The figures of a load test, in the terms of `vllm bench serve`, and the comparison of two runs.

TTFT, TPOT, ITL and E2EL are in milliseconds. Throughput counts completed requests over the time from the first arrival to the
last answer. Goodput counts the completed requests that meet all objectives. A request that was refused or failed misses its
objectives; one that the client cancelled counts as neither.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.load.client import Outcome

LATENCIES = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Objectives:
    """Most milliseconds of one request; None: any. `tpot` is its mean time between tokens."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    def met(self, outcome: Outcome) -> bool:
        limits = ((self.ttft, outcome.ttft), (self.tpot, outcome.tpot), (self.e2el, outcome.e2el))
        return outcome.completed and all(
            limit is None or seconds is None or 1000 * seconds <= limit for limit, seconds in limits
        )


def parse_objectives(pairs: Iterable[str]) -> Objectives:
    """From texts such as ttft:500. Raises ValueError."""
    given = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            given[name] = float(value)
        except ValueError:
            name = ""
        if name not in Objectives.__dataclass_fields__:
            raise ValueError(f"{pair}: must be ttft:MS, tpot:MS or e2el:MS")
    return Objectives(**given)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """By the nearest rank; None without values."""
    ordered = sorted(values)
    return ordered[max(math.ceil(percent / 100 * len(ordered)), 1) - 1] if ordered else None


def summary(outcomes: Sequence[Outcome], objectives: Objectives, begin: float = 0.0, end: float = math.inf) -> dict[str, Any]:
    """The figures of the requests that were due from `begin` to `end`, in seconds. Figures without a value are None."""
    chosen = [outcome for outcome in outcomes if begin <= outcome.due < end]
    done = [outcome for outcome in chosen if outcome.completed]
    stayed = [outcome for outcome in chosen if not outcome.cancelled]
    good = sum(objectives.met(outcome) for outcome in stayed)
    seconds = max((outcome.ended for outcome in chosen), default=0.0) - min((outcome.due for outcome in chosen), default=0.0)
    given = [outcome.accuracy for outcome in done if outcome.accuracy is not None]
    prompt, output = sum(one.prompt_tokens for one in done), sum(one.output_tokens for one in done)
    latencies: dict[str, list[float]] = {
        "ttft": [one.ttft for one in done if one.ttft is not None],
        "tpot": [one.tpot for one in done if one.tpot is not None],
        "itl": [gap for one in done for gap in one.gaps],
        "e2el": [one.e2el for one in done],
    }
    figures: dict[str, Any] = {
        "requests": len(chosen),
        "completed": len(done),
        "cancelled": len(chosen) - len(stayed),
        "errors": _count(one.code for one in stayed if one.code is not None),
        "duration": seconds,
        "request_throughput": _over(len(done), seconds),
        "request_goodput": _over(good, seconds),
        "good_share": _over(good, len(stayed)),
        "good_share_of_completed": _over(good, len(done)),
        "output_throughput": _over(output, seconds),
        "total_token_throughput": _over(prompt + output, seconds),
        "mean_accuracy": _over(sum(given), len(given)),
        "degraded_share": _over(sum(_degraded(one) for one in done), len(done)),
        "mean_cost_ratio": _mean([one.bytes_ratio for one in done if one.bytes_ratio is not None]),
        "served": _count(one.policy for one in done if one.policy is not None),
        "reasons": _count(one.reason for one in done if one.reason is not None),
        "mean_send_delay_ms": _thousand(_mean([one.sent - one.due for one in chosen])),
    }
    for name, values in latencies.items():
        figures[f"mean_{name}_ms"] = _thousand(_mean(values))
        for percent in PERCENTILES:
            figures[f"p{percent}_{name}_ms"] = _thousand(percentile(values, percent))
    return figures


def table(figures: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> list[list[str]]:
    """Rows of a name and its value; with `other`, also the other run's value and the ratio to it."""
    rows = []
    for name, value in figures.items():
        before = None if other is None else other.get(name)
        row = [name, show(value)]
        if other is not None:
            both = isinstance(value, (int, float)) and isinstance(before, (int, float)) and before
            row += [show(before), f"{value / before:.2f}" if both else ""]
        rows.append(row)
    return rows


def show(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "-"
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _degraded(outcome: Outcome) -> bool:
    """Whether the server lowered its accuracy."""
    return outcome.reason in ("auto", "queue", "deadline") and outcome.accuracy is not None and outcome.accuracy < 1


def _count(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def _over(amount: float, by: float) -> float | None:
    return amount / by if by else None


def _mean(values: Sequence[float]) -> float | None:
    return _over(sum(values), len(values))


def _thousand(value: float | None) -> float | None:
    return None if value is None else 1000 * value
