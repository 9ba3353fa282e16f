"""The controller: single decisions, properties over any load, and its response to steps of load in simulated time."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.policies.controller import (
    GENTLEST_FACTOR,
    INCREASE_STEP,
    RETRY_SECONDS,
    STRONGEST_FACTOR,
    Control,
    Controller,
    Direction,
)
from server.policies.load_meter import Forecast, Load, Measured
from server.policies.targets import Objective
from tests.server.policies.plant import Plant

BOTH = Objective(itl_ms=10.0, ttft_ms=1000.0)
TIMING = Control()
IDLE = Load()


def itl(milliseconds: float) -> Load:
    return Load(measured=Measured(itl_seconds=milliseconds / 1000))


def controller(accuracy: float = 1.0) -> Controller:
    made = Controller(0.0)
    made.accuracy = accuracy
    return made


# Single decisions


def test_the_queue_acts_before_a_latency_is_missed() -> None:
    decision = controller().decide(BOTH, Load(wait_seconds=0.6, measured=Measured(0.001, 0.1)), TIMING.react_seconds)
    assert (decision.direction, decision.cause) == ("down", "wait")  # more than half of the time to the first token
    decision = controller().decide(Objective(itl_ms=10.0), Load(queue_share=0.6), TIMING.react_seconds)
    assert (decision.direction, decision.cause) == ("down", "queue")
    growing = Load(token_seconds=lambda accuracy: 0.012 * accuracy, measured=Measured(0.001, 0.1))
    decision = controller().decide(BOTH, growing, TIMING.react_seconds)
    assert (decision.direction, decision.cause) == ("down", "token")  # the batch has grown, but no latency shows it yet


def test_a_latency_acts_once_the_change_before_has_taken_effect() -> None:
    for took, seconds in ((0.0, TIMING.dwell_seconds), (12.0, 12.0), (500.0, 30.0)):
        load = replace(itl(11), request_seconds=took)
        assert controller().decide(BOTH, load, seconds - 0.01).direction == "hold"
        decision = controller().decide(BOTH, load, seconds)
        assert (decision.direction, decision.cause, decision.accuracy) == ("down", "itl", GENTLEST_FACTOR)


@pytest.mark.parametrize(("over", "factor"), [(1.01, GENTLEST_FACTOR), (1.5, 1 / 1.5), (50, STRONGEST_FACTOR)])
def test_more_load_means_a_larger_decrease(over: float, factor: float) -> None:
    assert controller().decide(BOTH, Load(wait_seconds=over / 2), 9.0).accuracy == pytest.approx(factor)


def test_a_decrease_reaches_a_cheaper_policy() -> None:
    made = Controller(0.0, price_at=lambda accuracy: 1.0 if accuracy > 0.5 else 0.4)
    decision = made.decide(BOTH, Load(wait_seconds=0.51), 9.0)
    assert 0.4 < decision.accuracy <= 0.5
    made = Controller(0.0, price_at=lambda accuracy: 1.0)
    assert made.decide(replace(BOTH, min_accuracy=0.3), Load(wait_seconds=0.51), 9.0).accuracy == 0.3


@pytest.mark.parametrize(
    ("rush", "accuracy"),
    [
        # With 0.9 s to wait, 82% of the time is left for requests that arrive.
        (lambda accuracy: Forecast(0.005, 0.1, 2 * accuracy), 0.41),
        (lambda accuracy: Forecast(0.02 * accuracy, 0.1, 0.1), 0.5),
        (lambda accuracy: Forecast(0.005, 0.1, 3.0), 0.0),
        (lambda accuracy: Forecast(0.005, 0.1, 0.1), 1 / 1.8),
    ],
)
def test_a_decrease_goes_as_far_as_the_forecast_says(rush: Callable[[float], Forecast], accuracy: float) -> None:
    decision = controller().decide(BOTH, Load(wait_seconds=0.9, rush=rush), 9.0)
    assert decision.accuracy == pytest.approx(accuracy, abs=0.051) and decision.accuracy <= accuracy + 1e-9


def test_between_relaxed_and_target_nothing_moves() -> None:
    for milliseconds in (8.0, 9.0, 10.0):
        assert controller(0.5).decide(BOTH, itl(milliseconds), 9.0).direction == "hold"


def test_room_in_all_signals_raises_step_by_step() -> None:
    made = controller(0.5)
    assert made.decide(BOTH, itl(5), 9.0).accuracy == 0.5 + INCREASE_STEP
    assert made.decide(BOTH, itl(5), 9.0 + TIMING.react_seconds / 2).direction == "hold"
    assert made.decide(BOTH, itl(5), 9.0 + TIMING.react_seconds).accuracy == pytest.approx(0.5 + 2 * INCREASE_STEP)


def test_after_a_decrease_nothing_rises_for_the_dwell_time() -> None:
    made = controller()
    assert made.decide(BOTH, Load(wait_seconds=1.0), 9.0).direction == "down"
    assert made.decide(BOTH, IDLE, 9.0 + TIMING.dwell_seconds - 0.01).direction == "hold"
    assert made.decide(BOTH, IDLE, 9.0 + TIMING.dwell_seconds).direction == "up"


@pytest.mark.parametrize(
    ("forecast", "cause"),
    [(Forecast(0.011, 0.1, 0.5), "itl"), (Forecast(0.001, 1.1, 0.5), "ttft"), (Forecast(0.001, 0.1, 0.95), "wait")],
)
def test_a_forecast_that_would_miss_a_target_holds(forecast: Forecast, cause: str) -> None:
    decision = controller(0.5).decide(BOTH, Load(forecast=lambda accuracy: forecast), 9.0)
    assert (decision.direction, decision.cause) == ("hold", cause)


def test_what_failed_is_tried_again_later_and_later_under_the_same_load() -> None:
    made, now, tried = controller(), 0.0, []
    high, low = Load(wait_seconds=0.6, arrivals=100), Load(arrivals=100)
    while now < 1000:
        now += 0.5
        decision = made.decide(BOTH, high if made.accuracy > 0.85 else low, now)
        if decision.direction == "up" and decision.accuracy > 0.85:
            tried.append(now)
    gaps = [late - early for early, late in zip(tried, tried[1:], strict=False)]
    assert RETRY_SECONDS <= gaps[0] < gaps[1] < gaps[2]


def test_what_failed_is_tried_at_once_under_a_clearly_lower_load() -> None:
    made = controller()
    made.decide(BOTH, Load(wait_seconds=0.6, arrivals=100), 0.0 + TIMING.react_seconds)
    for second in range(10, 25):
        assert made.decide(BOTH, Load(arrivals=75), float(second)).accuracy < 1  # 80, less two deviations of 10
    for second in range(25, 28):
        made.decide(BOTH, Load(arrivals=50), float(second))
    assert made.accuracy == 1


# Properties

SHARE = st.floats(0, 1)
SECONDS = st.one_of(st.none(), st.floats(0, 100))
FORECAST = st.one_of(st.none(), st.builds(Forecast, st.floats(0, 9), st.floats(0, 9), st.floats(0, 9))).map(
    lambda forecast: lambda accuracy: forecast
)
LOAD = st.builds(
    Load,
    wait_seconds=st.floats(0, 1000),
    queue_share=SHARE,
    measured=st.builds(Measured, SECONDS, SECONDS),
    request_seconds=st.floats(0, 100),
    arrivals=st.integers(0, 5000),
    token_seconds=st.floats(0, 1).map(lambda seconds: lambda accuracy: seconds),
    forecast=FORECAST,
    rush=FORECAST,
)
LATENCY = st.one_of(st.none(), st.floats(0.1, 5000))


@given(
    start=SHARE,
    objective=st.builds(Objective, LATENCY, LATENCY, SHARE),
    loads=st.lists(st.tuples(LOAD, st.floats(0.01, 20)), max_size=40),
)
def test_whatever_happens_the_accuracy_keeps_its_bounds_and_its_pace(
    start: float, objective: Objective, loads: list[tuple[Load, float]]
) -> None:
    made, now = controller(start), 0.0
    for load, passed in loads:
        now += passed
        before, changed_at, last = made.accuracy, made.changed_at, made._last
        decision = made.decide(objective, load, now)
        assert objective.min_accuracy <= decision.accuracy <= 1
        assert (decision.accuracy, made.changed_at) == (made.accuracy, changed_at if decision.direction == "hold" else now)
        if decision.direction == "hold":
            assert decision.accuracy == before
            continue
        if decision.cause == "floor":
            assert before < objective.min_accuracy == decision.accuracy
            continue
        assert now - changed_at >= TIMING.react_seconds
        if decision.direction == "down":
            assert decision.accuracy < before and decision.signals[decision.cause] > 1
        else:
            assert before < decision.accuracy <= before + INCREASE_STEP + 1e-6
            assert max(decision.signals.values()) < 0.8
            assert last != "down" or now - changed_at >= TIMING.dwell_seconds


@given(objective=st.builds(Objective, LATENCY, LATENCY, SHARE), loads=st.lists(LOAD, min_size=1, max_size=10))
def test_the_same_arguments_give_the_same_decisions(objective: Objective, loads: list[Load]) -> None:
    def decisions() -> list[tuple[Direction, float]]:
        made = controller()
        found = (made.decide(objective, load, 7.0 * (number + 1)) for number, load in enumerate(loads))
        return [(decision.direction, decision.accuracy) for decision in found]

    assert decisions() == decisions()


# Step responses in simulated time

PROMPT_FIRST = Objective(itl_ms=40.0, ttft_ms=1000.0)
BACK_SECONDS = 8  # after a burst


@pytest.mark.parametrize("poisson", [False, True])
def test_a_burst_lowers_the_accuracy_and_its_end_brings_it_back_within_seconds(poisson: bool) -> None:
    plant = Plant(PROMPT_FIRST, output_tokens=20)
    burst = 1.5 * plant.capacity
    plant.run(30, 0.5 * plant.capacity, poisson)
    assert {decision.direction for decision in plant.decisions} == {"hold"}
    plant.run(60, burst, poisson)
    assert min(plant.accuracies(30)) < 0.67
    in_time = [first for arrived, _, first in plant.served if arrived >= 30 and first <= 1.0]
    assert len(in_time) > 0.9 * sum(arrived >= 30 for arrived, _, _ in plant.served)
    assert plant.rejected == 0
    plant.run(BACK_SECONDS, 0.5 * plant.capacity, poisson)
    assert plant.controller.accuracy == 1


def test_a_fixed_policy_fails_in_the_same_burst() -> None:
    """So that the test above means something."""
    plant = Plant(replace(PROMPT_FIRST, min_accuracy=1.0), output_tokens=20)
    plant.run(30, 0.5 * plant.capacity)
    plant.run(60, 1.5 * plant.capacity)
    in_burst = [first for arrived, _, first in plant.served if arrived >= 30]
    assert sum(first <= 1.0 for first in in_burst) < 0.3 * len(in_burst)
    assert plant.rejected > 0


def late_share(plant: Plant, calm: float, burst: float, itl_seconds: float) -> float:
    """The share of a burst's tokens that come later than they should."""
    plant.run(20, calm, poisson=True)
    late = total = 0
    for _ in range(60):
        before = plant.now
        plant.run(1, burst, poisson=True)
        gaps = [gap for at, gap in plant.meter._itl if at > before]
        late, total = late + sum(gap > itl_seconds for gap in gaps), total + len(gaps)
    return late / total


@pytest.mark.parametrize("seed", [0, 1])
def test_twice_the_load_that_full_accuracy_can_take_stays_inside_the_time_per_token(seed: int) -> None:
    """Three sequences at a time have 10 ms per token under `full`: 7.3 requests per second. Eight have as much under `fast`."""
    objective, calm, burst = Objective(itl_ms=12.0, ttft_ms=1000.0), 3.6, 14.6
    plant = Plant(objective, seed=seed)
    assert late_share(plant, calm, burst, 0.012) < 0.05
    assert sum(first > 1.0 for _, _, first in plant.served) < 0.1 * len(plant.served)
    fixed = Plant(replace(objective, min_accuracy=1.0), seed=seed)
    assert late_share(fixed, calm, burst, 0.012) > 0.6


@pytest.mark.parametrize("price_share", [0.8, 0.4])
def test_a_step_of_load_does_not_start_an_oscillation(price_share: float) -> None:
    plant = Plant(PROMPT_FIRST, output_tokens=20, price_share=price_share, noise=0.1)
    plant.run(20, 0.5 * plant.capacity)
    plant.run(200, 1.2 * plant.capacity)
    # Down, back up to what holds, and at most one more try a minute, ever more rarely.
    assert plant.reversals(20) <= 6
    assert plant.reversals(120) <= 2
    assert plant.served[-1][2] < 1.0


@pytest.mark.parametrize(("step_seconds", "rate"), [(0.02, 1 / 60), (0.0005, 150.0)])
def test_it_is_stable_at_one_request_a_minute_and_at_hundreds_a_second(step_seconds: float, rate: float) -> None:
    plant = Plant(PROMPT_FIRST, step_seconds=step_seconds, output_tokens=10)
    plant.run(600 if rate < 1 else 12, rate, poisson=True)
    assert plant.served and {decision.direction for decision in plant.decisions} == {"hold"}


def test_a_target_out_of_reach_at_one_request_a_minute_does_not_move_the_knob_to_and_fro() -> None:
    plant = Plant(Objective(itl_ms=1.0))
    plant.run(1800, 1 / 60)
    assert plant.controller.accuracy < 1
    assert plant.reversals(0) == 0


def test_requests_that_named_a_policy_keep_it() -> None:
    plant = Plant(PROMPT_FIRST, output_tokens=20, named=0.3, seed=1)
    plant.run(20, 1.4 * plant.capacity, poisson=True)
    assert plant.controller.accuracy < 1
    late = [policy for arrived, policy, _ in plant.served if arrived > 10]
    assert late.count("full") == pytest.approx(0.3 * len(late), rel=0.5)


@settings(max_examples=8, deadline=None)
@given(
    floor=SHARE,
    over=st.floats(0.1, 3.0),
    output_tokens=st.integers(2, 40),
    price_share=SHARE,
    noise=st.floats(0, 0.5),
    seed=st.integers(0, 99),
)
def test_no_server_and_no_load_brings_it_under_the_floor(
    floor: float, over: float, output_tokens: int, price_share: float, noise: float, seed: int
) -> None:
    objective = Objective(itl_ms=15.0, ttft_ms=300.0, min_accuracy=floor)
    plant = Plant(objective, output_tokens=output_tokens, price_share=price_share, noise=noise, seed=seed)
    plant.run(15, over * plant.capacity, poisson=True)
    assert all(floor <= accuracy <= 1 for accuracy in plant.accuracies(0))
