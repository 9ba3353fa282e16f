"""The burst: sizes and capacities are found, contradictions are refused, and both runs get the same requests."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from loadtests import burst
from loadtests.burst import Calibration
from loadtests.load.calibration import FINEST_FACTOR, Side, check, find_capacity, find_places
from loadtests.load.figures import Objectives
from loadtests.load.page import page
from server.app import Access
from tests.server.real import serving_model

SHORT = ["--prompt-tokens=4", "--output-tokens=16", "--clients-requests=2", "--trial-requests=4", "--trial-seconds=0.2"]
GENEROUS = Objectives(ttft=20000, tpot=20000)


async def test_both_runs_get_the_same_requests(moe_dir: Path, tmp_path: Path) -> None:
    args = burst.burst_parser().parse_args([str(moe_dir), *SHORT, "--before=0.3", "--peak-seconds=0.6", "--after=0.3"])
    found = Calibration(GENEROUS, Side("fixed", 1.0, 2, 1, 10.0), Side("cheapest", 0.0, 2, 1, 19.0))
    async with serving_model(moe_dir, "--max-num-seqs=2", access=Access(open_admin=True)) as url:
        record = await burst.play((url, url), args, found, "a command")
    assert record["times_capacity"] == pytest.approx(0.9 * 1.9)
    one, other = record["runs"]
    assert (one["name"], other["name"]) == ("fixed policy", "automatic control")
    assert one["figures"]["requests"] == other["figures"]["requests"] > 0
    assert one["figures"]["good_share"] == 1.0
    assert set(one["figures"]["reasons"]) == {"default"} and set(other["figures"]["reasons"]) == {"auto"}
    assert record["accuracy_before"] == 1.0
    assert [run["conditions"]["capacity_cheapest"] for run in record["runs"]] == [19.0, 19.0]
    assert "automatic control" in page(other, one) and "times_capacity" in page(other, one)
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert Calibration.read(tmp_path / "record.json") == found
    (tmp_path / "other.json").write_text(json.dumps({"calibration": {}}))
    with pytest.raises(ValueError, match="is not a record of loadtests.burst"):
        Calibration.read(tmp_path / "other.json")


def test_the_way_back_is_measured_from_the_end_of_the_burst() -> None:
    knob = [{"at": float(at), "accuracy": accuracy} for at, accuracy in enumerate([1.0, 1.0, 0.5, 0.0, 0.4, 0.9, 1.0, 0.8])]
    assert burst.recovery_seconds(knob, 3.0) == 3.0
    assert burst.recovery_seconds(knob[:5], 3.0) is None
    assert burst.recovery_seconds(knob[:2], 1.0) == 0.0
    assert burst.mean_accuracy(knob, 2.0, 4.0) == 0.25


@pytest.mark.parametrize(
    ("objective", "said"), [("e2el:100", "automatic control has the targets"), ("speed:1", "must be ttft:MS")]
)
def test_objectives_without_a_target_are_refused(objective: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        burst.main(["model", "--goodput", objective])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("wanted", "cheapest", "times"), [(None, 4.0, 2.0), (None, 3.0, 1.35), (2.5, 3.0, 2.5)])
def test_the_burst_is_no_larger_than_the_cheapest_policy_can_take(
    wanted: float | None, cheapest: float, times: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert burst.times_capacity(wanted, 2.0, cheapest) == pytest.approx(times)
    assert ("cannot take 2 times" in capsys.readouterr().err) == (times == 1.35)


async def test_sizes_and_capacity_are_found_with_requests_of_full_length(moe_dir: Path) -> None:
    args = burst.burst_parser().parse_args([str(moe_dir), *SHORT, "--headroom=1000", "--drift=1000"])
    found = Calibration(Objectives(ttft=20000), Side("fixed", 1.0), Side("cheapest", 0.0, 3, 5))
    async with (
        serving_model(moe_dir, "--max-num-seqs=3", access=Access(open_admin=True)) as url,
        burst._client(url) as http,
    ):
        await burst.find_sizes(http, args, found, most=2)
        assert found.first is not None and found.objectives.tpot == pytest.approx(1000 * found.first["p90_tpot_ms"], abs=0.1)
        assert [each["clients"] for each in found.fixed.clients] == [1, 2]
        assert (found.fixed.max_num_seqs, found.cheapest.max_num_seqs, found.cheapest.max_queue) == (2, 3, 5)
        assert found.fixed.max_queue is not None and found.fixed.max_queue >= 19 * 0.5
        await burst.find_rate(http, args, found.fixed, GENEROUS)
        shared = (await http.get("/metrics")).text
    lengths = [each["output_throughput"] / each["request_throughput"] for each in (*found.fixed.clients, *found.fixed.rates)]
    assert lengths == [pytest.approx(16)] * len(lengths)
    assert found.fixed.capacity == max(each["rate"] for each in found.fixed.rates)
    assert "ladimo_prefix_cache_hits_total 0.0" in shared, "prompts are fresh"


def model(capacity: float) -> Callable[[float], Awaitable[dict[str, Any]]]:
    async def rate(rate: float) -> dict[str, Any]:
        return {"rate": rate, "good_share": 0.95 if rate <= capacity else 0.4}

    return rate


@pytest.mark.parametrize("begin", [1.0, 2.9, 3.0, 3.1, 7.0])
async def test_the_capacity_is_found_from_both_sides(begin: float) -> None:
    side = Side("fixed", 1.0)
    found = await find_capacity(model(3.0), side, begin)
    assert 3.0 / FINEST_FACTOR <= found <= 3.0 and len(side.rates) <= 8
    with pytest.raises(ValueError, match="miss the objectives"):
        await find_capacity(model(0.001), side, begin)


async def test_places_and_queue_follow_from_the_clients_that_are_fast_enough() -> None:
    async def clients(number: int) -> dict[str, Any]:
        return {
            "clients": number,
            "good_share": 1.0 if number in (2, 3) else 0.2,
            "request_throughput": 2.0,
            "p90_ttft_ms": 100.0,
        }

    side = Side("fixed", 1.0)
    await find_places(clients, side, Objectives(ttft=2000, tpot=20), 16)
    assert (side.max_num_seqs, side.max_queue, len(side.clients)) == (3, 3, 5)
    given = Side("fixed", 1.0, 6)
    await find_places(clients, given, Objectives(ttft=2000, tpot=20), 16)
    assert (given.max_num_seqs, given.max_queue) == (6, 3)

    async def slow(number: int) -> dict[str, Any]:
        return {"clients": number, "good_share": 0.2}

    with pytest.raises(ValueError, match="one client alone and two miss the objectives at accuracy 1"):
        await find_places(slow, Side("fixed", 1.0), Objectives(ttft=2000, tpot=20), 16)


def side(accuracy: float, places: int, capacity: float | None, *tpot: float) -> Side:
    clients = [{"clients": number, "p90_tpot_ms": each} for number, each in enumerate(tpot, start=1)]
    return Side("side", accuracy, places, 4, capacity, clients)


@pytest.mark.parametrize(
    ("fixed", "cheapest", "said"),
    [
        (
            side(1.0, 3, None, 20.0, 15.0),
            side(0.0, 7, None, 7.0),
            "1 at a time had 20.0 ms per token, but 2 at a time had only 15.0 ms",
        ),
        (side(1.0, 3, None, 15.0, 25.0, 26.0), side(0.0, 7, None, 7.0), "2 clients had 25.0 and 18.0 ms per token"),
        (side(1.0, 3, None, 17.0, 18.0), side(0.0, 3, None, 7.0, 9.0), "3 clients at a time meet the objectives at accuracy 1"),
        (side(1.0, 3, 2.5), side(0.0, 7, 2.4), "the capacity is 2.50 requests per second at accuracy 1"),
    ],
)
def test_figures_that_contradict_each_other_are_refused(fixed: Side, cheapest: Side, said: str) -> None:
    with pytest.raises(ValueError, match="the calibration contradicts itself") as error:
        check(fixed, cheapest, {"clients": 2, "p90_tpot_ms": 18.0})
    assert said in str(error.value)


def test_figures_that_agree_are_accepted() -> None:
    check(side(1.0, 3, 2.4, 17.5, 18.0, 19.0), side(0.0, 7, 5.0, 7.0, 8.0), {"clients": 2, "p90_tpot_ms": 17.0})
