"""Automatic control as a pure function, and the latencies it is given."""

import time

from hypothesis import given
from hypothesis import strategies as st

from server.engine.messages import StepStats
from server.policies.controller import (
    DECREASE_FACTOR,
    DWELL_SECONDS,
    INCREASE_STEP,
    ControllerState,
    Measured,
    RecentLatencies,
    decide,
)
from server.policies.targets import Objective

ITL = Objective(itl_ms=10.0)
LATER = DWELL_SECONDS


def itl(milliseconds: float | None) -> Measured:
    return Measured(None if milliseconds is None else milliseconds / 1000, None)


def test_over_the_target_multiplies_down_and_well_under_it_steps_up() -> None:
    assert decide(ControllerState(1.0, 0.0), ITL, itl(11), LATER) == ("down", ControllerState(DECREASE_FACTOR, LATER))
    assert decide(ControllerState(0.5, 0.0), ITL, itl(5), LATER) == ("up", ControllerState(0.5 + INCREASE_STEP, LATER))
    assert decide(ControllerState(0.5, 0.0), ITL, itl(None), LATER)[0] == "up"


def test_between_relaxed_and_target_nothing_moves() -> None:
    state = ControllerState(0.5, 0.0)
    for milliseconds in (8.0, 9.0, 10.0):
        assert decide(state, ITL, itl(milliseconds), LATER) == ("hold", state)


def test_a_change_is_kept_for_the_dwell_time() -> None:
    state = ControllerState(0.5, 100.0)
    assert decide(state, ITL, itl(99), 100.0 + DWELL_SECONDS - 0.01) == ("hold", state)
    assert decide(state, ITL, itl(99), 100.0 + DWELL_SECONDS)[0] == "down"


def test_the_worse_of_two_targets_counts() -> None:
    both = Objective(itl_ms=10.0, ttft_ms=100.0)
    assert decide(ControllerState(1.0, 0.0), both, Measured(0.001, 0.2), LATER)[0] == "down"
    assert decide(ControllerState(0.5, 0.0), both, Measured(0.001, 0.095), LATER)[0] == "hold"
    assert decide(ControllerState(0.5, 0.0), ITL, Measured(0.001, 99.0), LATER)[0] == "up"


@given(
    start=st.floats(0, 1),
    floor=st.floats(0, 1),
    latencies=st.lists(st.one_of(st.none(), st.floats(0.01, 1000)), max_size=60),
)
def test_accuracy_stays_between_floor_and_one(start: float, floor: float, latencies: list[float | None]) -> None:
    objective = Objective(itl_ms=10.0, min_accuracy=floor)
    state, now = ControllerState(start, 0.0), 0.0
    for milliseconds in latencies:
        now += DWELL_SECONDS
        before = state
        direction, state = decide(state, objective, itl(milliseconds), now)
        assert floor <= state.accuracy <= 1
        assert (direction == "hold") == (state == before)
        assert direction != "down" or state.accuracy < before.accuracy


def test_steady_overload_reaches_the_floor_and_relief_reaches_one() -> None:
    state = ControllerState(1.0, 0.0)
    for step in range(1, 30):
        state = decide(state, ITL, itl(99), step * DWELL_SECONDS)[1]
    assert state.accuracy == 0
    for step in range(30, 80):
        state = decide(state, ITL, itl(1), step * DWELL_SECONDS)[1]
    assert state.accuracy == 1


def test_recent_latencies_are_90th_percentiles_of_the_window() -> None:
    latencies = RecentLatencies()
    stats = StepStats(0.1, 0, 10, 10, 0, 0.0, 0, inter_token_seconds=[("full", n / 1000) for n in range(1, 11)])
    assert latencies.measured(0.0) == Measured(None, None)
    latencies.observe(stats)
    assert latencies.measured(time.monotonic()) == Measured(0.009, None)
    assert latencies.measured(time.monotonic(), since=time.monotonic()) == Measured(None, None)
    assert latencies.measured(time.monotonic() + 1e6) == Measured(None, None)
