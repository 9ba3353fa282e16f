"""Automatic control: chooses the accuracy of requests that leave it to the server, so that the operator's targets are met.

The queue warns before latencies rise, so it is looked at first: if a request that came now would wait too long, or if the queue
fills up, the accuracy falls within a second. If a latency misses its target, the accuracy falls once the change before has
taken effect. Falling is multiplicative, by more under more load. Rising is additive. It needs room to spare in all signals, and
a forecast that the targets would still be met. Between falling and rising lies a range in which nothing changes (hysteresis).

An accuracy that did not hold is not tried again until the load is clearly lower, or until a time has passed that doubles with
each failure. This rules out oscillation even where the forecast is wrong.

The rule began as that of BrownoutServe (arXiv 2507.17133). The controller has no clock and no input but its arguments.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from server.policies.load_meter import ARRIVAL_SECONDS, Load
from server.policies.targets import Objective

# One decrease multiplies the accuracy by target / load, within these bounds.
GENTLEST_FACTOR, STRONGEST_FACTOR = 0.8, 0.5
INCREASE_STEP = 0.2
# A decrease goes further if the forecast says that requests would still arrive faster than they can be served, or that those
# which wait would not be served within so many seconds. It looks at accuracies that are so far apart.
DRAIN_SECONDS = 5.0
DECREASE_STEP = 0.05
# A decrease to less than this goes straight to the lowest allowed accuracy. Multiplication alone would never reach 0.
SMALLEST_ACCURACY = 0.05
# The accuracy may rise while all signals are below this share of their targets.
RELAXED_SHARE = 0.8
# How much of the time to the first token may be spent waiting, and how full the queue may be.
WAIT_SHARE = QUEUE_SHARE = 0.5
MAX_UTILISATION = 0.9  # forecast for an increase
# The load is clearly lower if fewer than this share of the requests arrive, and by more than two standard deviations of a
# Poisson process.
LOWER_SHARE, DEVIATIONS = 0.8, 2.0
MAX_SETTLE_SECONDS = 30.0
RETRY_SECONDS, MAX_RETRY_SECONDS = 30.0, 600.0

Direction = Literal["down", "hold", "up"]
# What a decision looked at. "wait": how long a request would wait that came now. "queue": how full the queue is. "token": the
# time between tokens if all sequences in the server ran at the present accuracy. "ttft", "itl": the measured latencies.
# "floor": the accuracy was below the lowest allowed one. "room": everything is relaxed. "ceiling": this accuracy failed a short
# while ago.
Cause = Literal["wait", "queue", "token", "ttft", "itl", "floor", "room", "ceiling"]
EARLY: tuple[Cause, ...] = ("wait", "queue", "token")
LATE: tuple[Cause, ...] = ("ttft", "itl")
CAUSES: tuple[Cause, ...] = (*EARLY, *LATE, "floor", "room", "ceiling")


@dataclass(frozen=True, slots=True)
class Control:
    """The timing, in seconds. `interval_seconds`: between two decisions. After a decrease, the accuracy stays for at least
    `react_seconds` before it falls further because of the queue, and for `dwell_seconds` before it falls because of a latency,
    or rises. Two increases are `react_seconds` apart."""

    interval_seconds: float = 0.5
    react_seconds: float = 1.0
    dwell_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision, why, and when. `signals`: each signal divided by its target; 1 is just met."""

    direction: Direction
    accuracy: float
    cause: Cause
    at: float
    signals: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Ceiling:
    """The price of an accuracy that failed, and the arrivals at that time. Under the same load, neither it nor a dearer one is
    tried before `until`."""

    price: float
    arrivals: int
    failed_at: float
    until: float
    failures: int = 1

    def is_over(self, arrivals: int) -> bool:
        """Whether the load is clearly lower than it was."""
        return arrivals < LOWER_SHARE * self.arrivals - DEVIATIONS * math.sqrt(self.arrivals)


class Controller:
    """`accuracy` is what it has chosen; `changed_at` is when it last changed. `price_at`: what an accuracy costs. Several have
    the same price, because the frontier has few points."""

    def __init__(
        self, now: float, timing: Control = Control(), price_at: Callable[[float], float] = lambda accuracy: accuracy
    ) -> None:
        self.accuracy = 1.0
        self.changed_at = now
        self._timing, self._price_at = timing, price_at
        self._last: Direction = "hold"
        self._ceiling: _Ceiling | None = None

    def decide(self, objective: Objective, load: Load, now: float) -> Decision:
        """Look at the load, and change the accuracy or leave it."""
        signals = signal_ratios(objective, load, self.accuracy)
        self._watch(load, now)
        direction, accuracy, cause = self._choose(objective, load, signals, now)
        if direction != "hold":
            self.accuracy, self.changed_at, self._last = accuracy, now, direction
        return Decision(direction, accuracy, cause, now, signals)

    def _choose(
        self, objective: Objective, load: Load, signals: Mapping[str, float], now: float
    ) -> tuple[Direction, float, Cause]:
        floor, accuracy = objective.min_accuracy, self.accuracy
        if accuracy < floor:
            return "up", floor, "floor"
        rested = now - self.changed_at
        timing = self._timing
        early, late = (max(causes, key=lambda cause: signals.get(cause, 0.0)) for causes in (EARLY, LATE))
        settle = max(timing.dwell_seconds, min(load.request_seconds, MAX_SETTLE_SECONDS))
        worst = max((early, late), key=lambda cause: signals.get(cause, 0.0))
        for cause, seconds in ((early, timing.react_seconds), (late, settle)):
            if signals.get(cause, 0.0) > 1:
                if accuracy <= floor or rested < seconds:
                    continue
                self._fail(load, now)
                lower = accuracy * min(max(1 / signals[cause], STRONGEST_FACTOR), GENTLEST_FACTOR)
                return "down", self._sufficient(objective, load, lower), cause
        if signals.get(worst, 0.0) >= RELAXED_SHARE or accuracy >= 1:
            return "hold", accuracy, worst
        if rested < (timing.dwell_seconds if self._last == "down" else timing.react_seconds):
            return "hold", accuracy, "room"
        higher = min(round(accuracy + INCREASE_STEP, 6), 1.0)
        limit = self._limit(objective, load, higher, now)
        return ("up", higher, "room") if limit is None else ("hold", accuracy, limit)

    def _sufficient(self, objective: Objective, load: Load, accuracy: float) -> float:
        """This accuracy or, if it is as dear as the present one or if the forecast says that it is not low enough, a lower one.
        Never below the lowest allowed accuracy."""
        floor, price = objective.min_accuracy, self._price_at(self.accuracy)
        while accuracy > floor and (self._price_at(accuracy) >= price or not _suffices(objective, load, accuracy)):
            accuracy -= DECREASE_STEP
        return max(accuracy if accuracy >= SMALLEST_ACCURACY else 0.0, floor)

    def _limit(self, objective: Objective, load: Load, accuracy: float, now: float) -> Cause | None:
        """What speaks against this higher accuracy; None if nothing does."""
        ceiling = self._ceiling
        if ceiling is not None and now < ceiling.until and self._price_at(accuracy) >= ceiling.price:
            return "ceiling"
        forecast = load.forecast(accuracy)
        if forecast is None:
            return None
        if forecast.utilisation > MAX_UTILISATION:
            return "wait"
        if objective.ttft_ms is not None and forecast.ttft_seconds * 1000 > objective.ttft_ms:
            return "ttft"
        if objective.itl_ms is not None and forecast.itl_seconds * 1000 > objective.itl_ms:
            return "itl"
        return None

    def _watch(self, load: Load, now: float) -> None:
        """Forget the ceiling once the load is clearly lower. The arrivals of a failure are known only some seconds later."""
        ceiling = self._ceiling
        if ceiling is None:
            return
        if now < ceiling.failed_at + ARRIVAL_SECONDS:
            ceiling.arrivals = max(ceiling.arrivals, load.arrivals)
        if ceiling.is_over(load.arrivals) or now > ceiling.until + MAX_RETRY_SECONDS:
            self._ceiling = None

    def _fail(self, load: Load, now: float) -> None:
        """The present accuracy failed. Decreases in a row are one failure, of the highest accuracy."""
        ceiling = self._ceiling
        if ceiling is None:
            self._ceiling = _Ceiling(self._price_at(self.accuracy), load.arrivals, now, now + RETRY_SECONDS)
            return
        if self._last != "down":
            ceiling.price, ceiling.failures = self._price_at(self.accuracy), ceiling.failures + 1
            ceiling.arrivals, ceiling.failed_at = load.arrivals, now
        ceiling.until = now + min(RETRY_SECONDS * 2 ** (ceiling.failures - 1), MAX_RETRY_SECONDS)


def _suffices(objective: Objective, load: Load, accuracy: float) -> bool:
    """Whether the targets would be met if requests went on to arrive as of late, and those that wait would soon be served."""
    forecast = load.rush(accuracy)
    if forecast is None:
        return True
    if objective.itl_ms is not None and forecast.itl_seconds * 1000 > objective.itl_ms:
        return False
    return objective.ttft_ms is None or forecast.utilisation + load.wait_seconds / DRAIN_SECONDS <= 1


def signal_ratios(objective: Objective, load: Load, accuracy: float) -> dict[str, float]:
    """Each signal that has a target, divided by it. `accuracy`: the present one."""
    signals: dict[str, float] = {"queue": load.queue_share / QUEUE_SHARE}
    if objective.ttft_ms is not None:
        signals["wait"] = load.wait_seconds * 1000 / (WAIT_SHARE * objective.ttft_ms)
        if load.measured.ttft_seconds is not None:
            signals["ttft"] = load.measured.ttft_seconds * 1000 / objective.ttft_ms
    if objective.itl_ms is not None:
        signals["token"] = load.token_seconds(accuracy) * 1000 / objective.itl_ms
        if load.measured.itl_seconds is not None:
            signals["itl"] = load.measured.itl_seconds * 1000 / objective.itl_ms
    return signals
