"""The burst: the capacity is found, both runs get the same requests, and the record has what it takes to compare them."""

import json
from pathlib import Path

import pytest

from loadtests import burst
from loadtests.load.figures import parse_objectives
from loadtests.load.page import page
from server.app import Access
from tests.server.real import serving_model


async def test_both_runs_get_the_same_requests(moe_dir: Path) -> None:
    flags = [str(moe_dir), "--before=0.3", "--peak-seconds=0.6", "--after=0.3", "--max-num-seqs=2", "--max-queue=1"]
    flags += ["--prompt-tokens=4", "--output-tokens=4-8", "--capacity-requests=4", "--burst=0.5", "--calm=0.2"]
    args = burst.burst_parser().parse_args(flags)
    args.goodput = parse_objectives(["ttft:20000", "tpot:20000"])
    async with serving_model(moe_dir, "--max-num-seqs=2", access=Access(open_admin=True)) as url:
        record = await burst.play(url, args, "a command")
    assert [each["clients"] for each in record["capacity_figures"]] == [1, 2, 3]
    assert record["capacity"] == max(each["request_throughput"] for each in record["capacity_figures"])
    one, other = record["runs"]
    assert (one["name"], other["name"]) == ("fixed policy", "automatic control")
    assert one["figures"]["requests"] == other["figures"]["requests"] > 0
    assert one["figures"]["good_share"] == 1.0
    assert set(one["figures"]["reasons"]) == {"default"} and set(other["figures"]["reasons"]) == {"auto"}
    assert record["recovery_seconds"] == 0.0
    assert "automatic control" in page(other, one)
    json.dumps(record)


def test_the_way_back_is_measured_from_the_end_of_the_burst() -> None:
    knob = [{"at": float(at), "accuracy": accuracy} for at, accuracy in enumerate([1.0, 1.0, 0.5, 0.0, 0.4, 0.9, 1.0, 1.0])]
    assert burst.recovery_seconds(knob, 3.0) == 2.0
    assert burst.recovery_seconds(knob[:5], 3.0) is None
    assert burst.recovery_seconds(knob[:2], 1.0) == 0.0


@pytest.mark.parametrize(
    ("objective", "said"), [("e2el:100", "automatic control has the targets"), ("speed:1", "must be ttft:MS")]
)
def test_objectives_without_a_target_are_refused(objective: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        burst.main(["model", "--goodput", objective])
    assert said in capsys.readouterr().err


async def test_what_the_flags_leave_open_is_found_with_two_clients_and_the_cheapest_policy(moe_dir: Path) -> None:
    flags = [str(moe_dir), "--prompt-tokens=4", "--output-tokens=4-8", "--capacity-requests=2", "--headroom=1000"]
    async with (
        serving_model(moe_dir, "--max-num-seqs=3", access=Access(open_admin=True)) as url,
        burst._client(url) as http,
    ):
        args = burst.burst_parser().parse_args(flags)
        args.goodput = parse_objectives(["ttft:20000"])
        first, *rest = await burst.calibrate(http, args, most=3)
        assert (first["accuracy"], first["clients"]) == (1.0, 2)
        assert args.goodput.tpot == pytest.approx(1000 * first["p90_tpot_ms"], abs=0.1)
        assert {each["accuracy"] for each in rest} == {0.0}
        assert [each["clients"] for each in rest] == [1, 2, 3]
        assert args.max_num_seqs == 3
        assert args.max_queue >= 20 * rest[-1]["request_throughput"]

        args = burst.burst_parser().parse_args([*flags, "--max-num-seqs=2", "--max-queue=3"])
        args.goodput = parse_objectives(["ttft:20000"])
        await burst.calibrate(http, args)
        assert args.goodput.tpot is not None and (args.max_num_seqs, args.max_queue) == (2, 3)

        args = burst.burst_parser().parse_args(flags)
        args.goodput = parse_objectives(["ttft:20000", "tpot:0.0001"])
        with pytest.raises(ValueError, match="one client alone misses"):
            await burst.calibrate(http, args)
