"""Automatic control: sets the accuracy of the default from measured latencies.

While a target is missed, the accuracy is multiplied by a factor below 1. While all targets are met with room to spare, it rises
in small steps. In between it stays (hysteresis). Two changes are at least `Control.dwell_seconds` apart. The rule is that of
BrownoutServe (arXiv 2507.17133), with hysteresis and the minimum time added.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from server.engine.messages import StepStats
from server.policies.targets import Objective

DECREASE_FACTOR = 0.8
INCREASE_STEP = 0.05
# The accuracy may rise while all latencies are below this share of their targets.
RELAXED_SHARE = 0.8
DWELL_SECONDS = 5.0
# A decrease to less than this goes straight to the lowest allowed accuracy. Multiplication alone would never reach 0.
SMALLEST_ACCURACY = 0.05
WINDOW_SECONDS = 15.0
MAX_SAMPLES = 4096

Direction = Literal["down", "hold", "up"]


@dataclass(frozen=True, slots=True)
class Control:
    """The timing in seconds: between two decisions, and the minimum between two changes of the accuracy."""

    interval_seconds: float = 1.0
    dwell_seconds: float = DWELL_SECONDS


@dataclass(frozen=True, slots=True)
class Measured:
    """90th percentiles of recent latencies in seconds: between tokens, and to the first token. None without a sample."""

    itl_seconds: float | None
    ttft_seconds: float | None


@dataclass(frozen=True, slots=True)
class ControllerState:
    """The accuracy, 0 to 1, and when it last changed, in seconds of `RecentLatencies.clock`."""

    accuracy: float
    changed_at: float


def decide(
    state: ControllerState, objective: Objective, measured: Measured, now: float, dwell_seconds: float = DWELL_SECONDS
) -> tuple[Direction, ControllerState]:
    """Decide whether the accuracy goes down, stays or goes up, and return the next state. A pure function."""
    floor = objective.min_accuracy
    if state.accuracy < floor:
        return "up", ControllerState(floor, now)
    if now - state.changed_at < dwell_seconds:
        return "hold", state
    load = _load(objective, measured)
    if load > 1 and state.accuracy > floor:
        lower = state.accuracy * DECREASE_FACTOR
        return "down", ControllerState(max(lower if lower >= SMALLEST_ACCURACY else 0.0, floor), now)
    if load < RELAXED_SHARE and state.accuracy < 1:
        return "up", ControllerState(min(state.accuracy + INCREASE_STEP, 1.0), now)
    return "hold", state


def _load(objective: Objective, measured: Measured) -> float:
    """The larger ratio of a measured latency to its target; 0 without samples."""
    pairs = ((measured.itl_seconds, objective.itl_ms), (measured.ttft_seconds, objective.ttft_ms))
    return max(
        (seconds * 1000 / target for seconds, target in pairs if seconds is not None and target is not None), default=0.0
    )


class RecentLatencies:
    """The latencies of the last WINDOW_SECONDS, collected from engine steps. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._itl: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)
        self._ttft: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def observe(self, stats: StepStats) -> None:
        """Add the latencies of one step."""
        now = self.clock()
        self._itl.extend((now, seconds) for _, seconds in stats.inter_token_seconds)
        self._ttft.extend((now, seconds) for _, seconds in stats.first_token_seconds)

    def measured(self, now: float, since: float = -math.inf) -> Measured:
        """Percentiles of the latencies after `since`, at most WINDOW_SECONDS old. Times are in seconds of `clock`.

        `since` is the last change of accuracy. Older samples would make the controller react twice to the same load.
        """
        begin = max(now - WINDOW_SECONDS, since)
        return Measured(*(_p90(seconds for at, seconds in samples if at >= begin) for samples in (self._itl, self._ttft)))


def _p90(samples: Iterable[float]) -> float | None:
    ordered = sorted(samples)
    return ordered[math.ceil(0.9 * len(ordered)) - 1] if ordered else None
