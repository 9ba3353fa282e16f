"""Step costs: learned from durations, apart for decoding and prompts, and what follows from them."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.messages import StepStats
from server.policies.costs import Demand, Fit, StepCosts
from server.policies.load_meter import LoadMeter, Queue
from tests.server.policies.plant import PRICES

IDLE = StepStats(0.0, 0, 0, 0, 0, 0.0, 0)
PRICE = st.sampled_from([*PRICES.values()])


def step_seconds(rows: int, price: float) -> float:
    return 0.004 + 0.006 * price + rows * (0.0001 + 0.0005 * price)


def prompt_seconds(tokens: int, price: float) -> float:
    return 0.001 + tokens * (2e-5 + 8e-5 * price)


def taught(steps: int = 3000, noise: float = 0.0, price_matters: bool = True) -> StepCosts:
    costs, draw = StepCosts(), random.Random(1)
    for _ in range(steps):
        rows, tokens, price = draw.randint(0, 32), draw.choice((0, 0, 64, 200, 512)), draw.choice([*PRICES.values()])
        paid = price if price_matters else 0.5
        seconds = (step_seconds(rows, paid) if rows else 0.0) + (prompt_seconds(tokens, paid) if tokens else 0.0)
        if rows or tokens:
            spread = 1 + noise * (2 * draw.random() - 1)
            costs.observe({price: rows} if rows else {}, {price: tokens} if tokens else {}, seconds * spread)
    return costs


@pytest.mark.parametrize(("noise", "close"), [(0.0, 0.02), (0.3, 0.15)])
def test_steps_that_do_both_teach_each_part_its_own_cost(noise: float, close: float) -> None:
    costs = taught(noise=noise)
    for rows, price in ((1, 0.4), (8, 1.0), (32, 0.6)):
        assert costs.step_seconds(rows, price) == pytest.approx(step_seconds(rows, price), rel=close)
    for tokens, price in ((64, 1.0), (512, 0.4)):
        assert costs.prompt_seconds(tokens, price) == pytest.approx(prompt_seconds(tokens, price), rel=close)


def test_a_price_that_changes_nothing_is_found_out() -> None:
    costs = taught(price_matters=False)
    assert costs.step_seconds(8, 0.4) == pytest.approx(costs.step_seconds(8, 1.0), rel=0.02)
    assert costs.prompt_seconds(512, 0.4) == pytest.approx(costs.prompt_seconds(512, 1.0), rel=0.02)


def test_under_one_policy_the_price_is_guessed_between_nothing_and_everything() -> None:
    costs = StepCosts()
    for _ in range(10):
        for rows in (1, 4, 8):
            costs.observe({1.0: rows}, {}, step_seconds(rows, 1.0))
    full, cheap = costs.step_seconds(8, 1.0), costs.step_seconds(8, 0.4)
    assert full == pytest.approx(step_seconds(8, 1.0), rel=0.05)
    assert 0.45 * full < cheap < 0.95 * full


def test_costs_follow_a_machine_that_becomes_slower() -> None:
    costs = taught()
    for _ in range(200):
        for rows in range(1, 33):
            costs.observe({1.0: rows}, {}, 2 * step_seconds(rows, 1.0))
    assert costs.step_seconds(16, 1.0) == pytest.approx(2 * step_seconds(16, 1.0), rel=0.1)


@given(st.lists(st.tuples(PRICE, st.integers(0, 32), st.integers(0, 512), st.floats(0, 10)), max_size=80))
def test_whatever_is_measured_costs_are_finite_and_not_negative(steps: list[tuple[float, int, int, float]]) -> None:
    costs = StepCosts()
    for price, rows, tokens, seconds in steps:
        if rows or tokens:
            costs.observe({price: rows} if rows else {}, {price: tokens} if tokens else {}, seconds)
    demand = Demand(3.0, 50.0, 20.0)
    for price in PRICES.values():
        for seconds in (costs.step_seconds(8, price), costs.prompt_seconds(100, price), costs.token_seconds(demand, 8, price)):
            assert 0 <= seconds < 1e6
        assert 0 <= costs.utilisation(demand, 8, price) < 1e6


def test_no_coefficient_is_negative_where_plain_least_squares_has_one() -> None:
    fit = Fit(2)
    for _ in range(100):
        fit.observe((1.0, 1.0), 2.0)
        fit.observe((1.0, 2.0), 1.0)
    assert (fit.coefficients >= 0).all()
    assert fit.coefficients @ (1.0, 1.0) == pytest.approx(1.5, rel=0.05)


def test_more_requests_make_larger_batches_and_slower_tokens() -> None:
    costs = taught()
    few, many, too_many = (costs.token_seconds(Demand(rate, 64.0, 40.0), 16, 1.0) for rate in (0.1, 10.0, 1000.0))
    assert few == pytest.approx(step_seconds(1, 1.0), rel=0.1)
    assert few < many < too_many
    assert costs.utilisation(Demand(10.0, 64.0, 40.0), 16, 1.0) == pytest.approx(
        10 * (prompt_seconds(64, 1.0) + 40 * step_seconds(16, 1.0) / 16), rel=0.05
    )


def test_the_wait_is_that_for_a_place_or_for_the_prompts_before() -> None:
    meter = LoadMeter(PRICES.__getitem__)
    assert meter.wait_seconds(Queue(20, 1000, 8, 64)) == 0.0  # nothing is known
    meter.costs = taught()
    meter._output.add(40.0)
    meter._prompt.add(64.0)
    assert meter.wait_seconds(Queue(8, 0, 8, 64)) == 0.0
    one = 40 * step_seconds(8, 1.0) / 8 + prompt_seconds(64, 1.0)
    assert meter.wait_seconds(Queue(9, 0, 8, 64)) == pytest.approx(one, rel=0.05)
    assert meter.wait_seconds(Queue(19, 640, 8, 64)) == pytest.approx(11 * one, rel=0.05)
    assert meter.wait_seconds(Queue(7, 5120, 8, 64)) == pytest.approx(10 * prompt_seconds(512, 1.0), rel=0.05)


def test_demand_and_percentiles_are_of_their_windows() -> None:
    meter = LoadMeter()
    for second in range(20):
        meter.arrived(3, float(second))
    assert meter.demand(19.0).sequences_per_second == 3.0
    assert meter.demand(100.0).sequences_per_second == 0.0


@pytest.mark.parametrize(("limit", "steps"), [(64, 8), (512, 1), (2048, 1)])
def test_a_prompt_pays_for_every_step_that_it_takes(limit: int, steps: int) -> None:
    meter = LoadMeter()
    draw = random.Random(1)
    for now in range(400):
        tokens = draw.randint(1, limit)
        meter.observe(
            replace(IDLE, interval_seconds=prompt_seconds(tokens, 1.0), prefilled_tokens={"full": tokens}, prompt_limit=limit),
            now,
        )
    expected = prompt_seconds(512, 1.0) + (steps - 1) * prompt_seconds(0, 1.0)
    assert meter.costs.prompt_seconds(512, 1.0) == pytest.approx(expected, rel=0.02)
