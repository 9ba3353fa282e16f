"""The frontier and the knob that walks it."""

import json
import math
import random
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ladimo.policy import Frontier, FrontierPoint, pareto

figures = st.tuples(st.floats(0.1, 1.2), st.floats(1, 100))
# A grid of few values, so that ties in cost and in accuracy are common.
coarse = st.tuples(st.sampled_from([0.5, 0.6, 0.7, 0.8]), st.sampled_from([10.0, 11.0, 12.0]))
point_lists = st.lists(figures | coarse, min_size=1, max_size=8).map(lambda pairs: [point(i, *p) for i, p in enumerate(pairs)])
accuracies = st.floats(0, 1)


def point(number: int, ratio: float, perplexity: float, batch: int = 1) -> FrontierPoint:
    return FrontierPoint(batch, f"p{number}", ratio, perplexity, perplexity / 9, (1.5, None))


@given(points=point_lists)
def test_pareto_keeps_exactly_the_unbeaten(points: list[FrontierPoint]) -> None:
    kept = pareto(points)
    for left, right in zip(kept, kept[1:], strict=False):
        assert left.active_parameters_ratio < right.active_parameters_ratio
        assert left.perplexity > right.perplexity
    for candidate in points:
        beaten = any(
            p.active_parameters_ratio <= candidate.active_parameters_ratio and p.perplexity <= candidate.perplexity
            for p in kept
            if p is not candidate
        )
        assert candidate in kept or beaten
        assert not (candidate in kept and beaten)


@given(points=point_lists, first=accuracies, second=accuracies)
def test_knob_is_monotone(points: list[FrontierPoint], first: float, second: float) -> None:
    """On any set of points: turning the knob up never loses accuracy; on a frontier it never lowers the cost either."""
    low, high = sorted((first, second))
    anything = Frontier(tuple(points))
    assert anything.choose(high).perplexity <= anything.choose(low).perplexity
    frontier = Frontier(pareto(points))
    assert frontier.choose(high).active_parameters_ratio >= frontier.choose(low).active_parameters_ratio


@given(points=point_lists, accuracy=accuracies)
def test_knob_picks_the_most_accurate_affordable_point(points: list[FrontierPoint], accuracy: float) -> None:
    frontier = Frontier(tuple(points))
    costs = [p.active_parameters_ratio for p in points]
    limit = min(costs) + accuracy * (max(costs) - min(costs))
    chosen = frontier.choose(accuracy)
    assert chosen.active_parameters_ratio <= limit + 1e-8
    assert chosen.perplexity <= min(p.perplexity for p in points if p.active_parameters_ratio <= limit)


@given(points=point_lists)
def test_ends_of_the_knob(points: list[FrontierPoint]) -> None:
    frontier = Frontier(pareto(points))
    assert frontier.choose(1.0).perplexity == min(p.perplexity for p in points)
    # Points closer than the knob's tolerance are one point to it.
    assert frontier.choose(0.0).active_parameters_ratio <= min(p.active_parameters_ratio for p in points) + 1e-8


@settings(max_examples=300)
@given(points=point_lists)
def test_position_is_where_the_knob_finds_the_policy(points: list[FrontierPoint]) -> None:
    """However the costs round; points closer than the knob's tolerance are one point to it."""
    frontier = Frontier(pareto(points))
    costs = [p.active_parameters_ratio for p in frontier.points]
    assume(all(right - left > 1e-6 for left, right in zip(costs, costs[1:], strict=False)))
    for p in frontier.points:
        position = frontier.position(p.policy)
        assert position is not None and 0 <= position <= 1
        assert frontier.choose(position) == p


def test_position_survives_rounding() -> None:
    """lowest + (cost - lowest) / span * span often rounds to just below the cost; the point must stay reachable."""
    draw = random.Random(0)
    for _ in range(200):
        costs = sorted(draw.uniform(0.4, 1.1) for _ in range(3))
        frontier = Frontier(tuple(point(i, cost, 10.0 - i) for i, cost in enumerate(costs)))
        for p in frontier.points:
            assert frontier.choose(frontier.position(p.policy) or 0.0) == p


def test_position_of_a_stranger_and_of_the_only_point() -> None:
    frontier = Frontier((point(0, 0.5, 10.0),))
    assert frontier.position("p0") == 1.0
    assert frontier.position("other") is None
    assert frontier.choose(0.0) == frontier.choose(1.0) == frontier.points[0]


@pytest.mark.parametrize("accuracy", [math.nan, -0.01, 1.01, math.inf, -math.inf])
def test_knob_refuses_what_is_no_accuracy(accuracy: float) -> None:
    with pytest.raises(ValueError, match="accuracy"):
        Frontier((point(0, 0.5, 10.0), point(1, 0.6, 9.0))).choose(accuracy)


def test_knob_by_hand() -> None:
    """The contract's formula on three points: limits 0.5, 0.75 and 1.0 at 0, 0.5 and 1."""
    frontier = Frontier((point(0, 0.5, 12.0), point(1, 0.7, 11.0), point(2, 1.0, 10.0)))
    chosen = [frontier.choose(a).policy for a in (0.0, 0.39, 0.4, 0.5, 0.99, 1.0)]
    assert chosen == ["p0", "p0", "p1", "p1", "p1", "p2"]


def test_for_batch() -> None:
    frontier = Frontier((point(0, 0.5, 12.0), point(1, 0.6, 11.0, batch=8), point(2, 0.7, 10.0)))
    assert [p.policy for p in frontier.for_batch(1).points] == ["p0", "p2"]
    assert [p.policy for p in frontier.for_batch(8).points] == ["p1"]
    with pytest.raises(ValueError, match=r"batch 4; it has \[1, 8\]"):
        frontier.for_batch(4)


@given(points=point_lists)
def test_json_round_trip(points: list[FrontierPoint]) -> None:
    frontier = Frontier(tuple(points))
    assert Frontier.from_dict(json.loads(json.dumps(frontier.to_dict()))) == frontier


def test_a_ruined_model_still_has_a_frontier() -> None:
    """A conversion that went badly is measured, stored and read like any other."""
    frontier = Frontier((point(0, 0.5, 1e30),))
    assert Frontier.from_dict(json.loads(json.dumps(frontier.to_dict()))) == frontier


@pytest.mark.parametrize(
    ("change", "field"),
    [
        *(({"batch": value}, "batch") for value in (0, -1, True, 1.0, "1", None)),
        *(({"policy": value}, "policy") for value in (None, 3, ["full"])),
        *(
            ({name: value}, name)
            for name in ("active_parameters_ratio", "perplexity", "perplexity_ratio")
            for value in (0, -1.0, math.nan, math.inf, "1", None, True, 10**400, [1.0])
        ),
        *(({"experts_per_token": value}, "experts_per_token") for value in (None, 3, "12", [-1], [math.nan], ["1"], [True])),
        ({"colour": 1}, "colour"),
    ],
)
def test_wrong_field_is_named(change: dict[str, Any], field: str) -> None:
    good = point(0, 0.5, 10.0).to_dict()
    with pytest.raises(ValueError, match=rf"^points\[1\].{field}: "):
        Frontier.from_dict({"points": [good, {**good, **change}]})


@pytest.mark.parametrize("missing", ["batch", "policy", "active_parameters_ratio", "perplexity", "experts_per_token"])
def test_missing_field_is_named(missing: str) -> None:
    raw = point(0, 0.5, 10.0).to_dict()
    del raw[missing]
    with pytest.raises(ValueError, match=rf"^points\[0\].{missing}: missing"):
        Frontier.from_dict({"points": [raw]})


@pytest.mark.parametrize("raw", [None, [], 3, "points", {}, {"points": None}, {"points": {}}, {"points": "abc"}])
def test_what_is_no_frontier_is_refused(raw: object) -> None:
    with pytest.raises(ValueError, match="^points: "):
        Frontier.from_dict(raw)


@pytest.mark.parametrize("raw", [None, 3, "x", [1]])
def test_what_is_no_point_is_refused(raw: object) -> None:
    with pytest.raises(ValueError, match=r"^points\[0\]: "):
        Frontier.from_dict({"points": [raw]})
