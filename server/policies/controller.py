"""Automatic control of the knob: measured latency in, accuracy out.

Multiplicative decrease while an objective is missed, slow increase while all are met with room to spare, nothing in between
(hysteresis), and a minimum time between two changes. The rule is BrownoutServe's (arXiv 2507.17133) with hysteresis and dwell.
"""

import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from server.engine.messages import StepStats
from server.policies.targets import Objective

DECREASE_FACTOR = 0.8
INCREASE_STEP = 0.05
# Below this share of every target there is room to spare.
RELAXED_SHARE = 0.8
DWELL_SECONDS = 5.0
# A decrease that would land below this goes to the floor, which multiplication alone never reaches.
SMALLEST_ACCURACY = 0.05
WINDOW_SECONDS = 15.0
MAX_SAMPLES = 4096

Direction = Literal["down", "hold", "up"]


@dataclass(frozen=True, slots=True)
class Measured:
    """90th percentiles of recent tokens in seconds; None without a sample."""

    itl_seconds: float | None
    ttft_seconds: float | None


@dataclass(frozen=True, slots=True)
class ControllerState:
    """`changed_at`: when the accuracy last changed, `time.monotonic()` seconds."""

    accuracy: float
    changed_at: float


def decide(state: ControllerState, objective: Objective, measured: Measured, now: float) -> tuple[Direction, ControllerState]:
    """The next state of the knob. A pure function of its arguments."""
    floor = objective.min_accuracy
    if state.accuracy < floor:
        return "up", ControllerState(floor, now)
    if now - state.changed_at < DWELL_SECONDS:
        return "hold", state
    load = _load(objective, measured)
    if load > 1 and state.accuracy > floor:
        lower = state.accuracy * DECREASE_FACTOR
        return "down", ControllerState(max(lower if lower >= SMALLEST_ACCURACY else 0.0, floor), now)
    if load < RELAXED_SHARE and state.accuracy < 1:
        return "up", ControllerState(min(state.accuracy + INCREASE_STEP, 1.0), now)
    return "hold", state


def _load(objective: Objective, measured: Measured) -> float:
    """Measured latency over its target, the worse of the two; 0 when nothing runs."""
    pairs = ((measured.itl_seconds, objective.itl_ms), (measured.ttft_seconds, objective.ttft_ms))
    return max(
        (seconds * 1000 / target for seconds, target in pairs if seconds is not None and target is not None), default=0.0
    )


class RecentLatencies:
    """The latencies of the last seconds, taken from engine steps."""

    def __init__(self) -> None:
        self._itl: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)
        self._ttft: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def observe(self, stats: StepStats) -> None:
        now = time.monotonic()
        self._itl.extend((now, seconds) for _, seconds in stats.inter_token_seconds)
        self._ttft.extend((now, seconds) for _, seconds in stats.first_token_seconds)

    def measured(self, now: float, since: float = -math.inf) -> Measured:
        """What has been seen since then, at most WINDOW_SECONDS ago. What was seen under the knob's last position would make
        it move twice for one reason."""
        begin = max(now - WINDOW_SECONDS, since)
        return Measured(*(_p90(seconds for at, seconds in samples if at >= begin) for samples in (self._itl, self._ttft)))


def _p90(samples: Iterable[float]) -> float | None:
    ordered = sorted(samples)
    return ordered[math.ceil(0.9 * len(ordered)) - 1] if ordered else None
