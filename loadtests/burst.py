"""A burst of twice the capacity: the same requests under a fixed policy and under automatic control.

    python -m loadtests.burst MODEL --html burst.html
    python -m loadtests.burst MODEL --calibrate --json found.json     # in two parts
    python -m loadtests.burst MODEL --calibration found.json --html burst.html

Each side gets the server that suits it. What the flags leave open is found first:

- The objective of the time per token is what two clients at a time get under the fixed policy, times `--headroom` (1.15). One
  client alone would give too strict an objective: at half of the capacity requests already overlap, and would miss it.
- The places in the batch: the most clients at a time that still meet the objectives, under the fixed policy and under the
  cheapest one.
- The length of the queue: what these clients complete within the objective of the first token.
- The capacity, again of both: the largest rate of random arrivals at which 90% of the requests meet the objectives.

Figures that contradict each other are refused. Then requests arrive at half of the capacity of the fixed policy, for a minute
at twice this capacity, and at half of it again. If the cheapest policy cannot take twice, the burst is as large as it can take,
less 10%. This is played with the fixed policy, and then under automatic control with the objectives as its targets. Both get
the same requests at the same times. A refused request counts as outside the objectives.
"""

import argparse
import asyncio
import shlex
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from ladimo.checkpoint import read_json, write_text
from loadtests.common.conditions import conditions
from loadtests.common.records import command_line, finish
from loadtests.load.calibration import DRIFT, Figures, Probe, Side, check, find_capacity, find_places
from loadtests.load.figures import Objectives, parse_objectives, show, table
from loadtests.load.page import page, plot
from loadtests.load.servers import Server, running
from loadtests.load.workload import Lengths, parse_lengths, parse_routing
from loadtests.load_test import make_parser, measure

FIXED, CONTROLLED = "fixed policy", "automatic control"
OVERLAPPING = 2  # clients at a time from which the objective of the time per token follows
MOST_PLACES = 16  # that are tried
BURST, SAFE_SHARE = 2.0, 0.9  # times the capacity of the fixed policy, or of the most that the cheapest can take
BEGIN_SHARE = 0.8  # of the throughput of a full batch: where the search for the capacity begins
TTFT_MS = 2000.0  # unless it is given
SHOWN = ("requests", "completed", "errors", "good_share", "good_share_of_completed", "p50_ttft_ms", "p90_ttft_ms")
SHOWN_TOO = ("p90_tpot_ms", "mean_accuracy")


@dataclass(slots=True)
class Calibration:
    """`first`: the figures from which the objective of the time per token follows; None: it was given."""

    objectives: Objectives
    fixed: Side
    cheapest: Side
    first: Figures | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def read(path: Path) -> "Calibration":
        """From a record of this command. Raises ValueError, OSError."""
        try:
            found = read_json(path)["calibration"]
            fixed, cheapest = Side(**found["fixed"]), Side(**found["cheapest"])
            return Calibration(Objectives(**found["objectives"]), fixed, cheapest, found["first"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: is not a record of loadtests.burst ({error})") from error


async def find_sizes(http: httpx.AsyncClient, args: argparse.Namespace, found: Calibration, most: int = MOST_PLACES) -> None:
    """Find the objective of the time per token, and places and queues of both sides, where they are open.

    `most`: places that are tried; the server must have so many. Raises ValueError if a policy misses the objectives with one
    client and with two, and if figures contradict each other.
    """
    probe = await Probe.open(http, args)
    await probe.set_accuracy(found.fixed.accuracy)
    await probe.clients(OVERLAPPING, found.objectives)  # warm-up
    if found.objectives.tpot is None:
        found.first = await probe.clients(OVERLAPPING, found.objectives)
        found.objectives = replace(found.objectives, tpot=round(args.headroom * found.first["p90_tpot_ms"], 1))
    for side in (found.cheapest, found.fixed):
        await probe.set_accuracy(side.accuracy)
        await find_places(lambda number: probe.clients(number, found.objectives), side, found.objectives, most)
    check(found.fixed, found.cheapest, found.first, args.drift)


async def find_rate(http: httpx.AsyncClient, args: argparse.Namespace, side: Side, objectives: Objectives) -> None:
    """Find the capacity of a side, on a server of its sizes."""
    probe = await Probe.open(http, args)
    await probe.set_accuracy(side.accuracy)
    assert side.max_num_seqs is not None
    full = await probe.clients(side.max_num_seqs, objectives)  # also the warm-up
    await find_capacity(lambda rate: probe.rate(rate, objectives), side, BEGIN_SHARE * full["request_throughput"])


def times_capacity(wanted: float | None, fixed: float, cheapest: float) -> float:
    """How many times the capacity of the fixed policy the burst has. `wanted`: by the flags; None leaves it open. `fixed`,
    `cheapest`: capacities in requests per second."""
    most = cheapest / fixed
    print(f"capacity {fixed:.2f} and {cheapest:.2f} requests per second: the cheapest takes {most:.2f} times", file=sys.stderr)
    if wanted is not None:
        return wanted
    if most >= BURST:
        return BURST
    times = SAFE_SHARE * most
    print(f"the cheapest policy cannot take {BURST:g} times the capacity, so the burst has {times:.2f} times", file=sys.stderr)
    return times


async def play(urls: Sequence[str], args: argparse.Namespace, found: Calibration, command: str) -> dict[str, Any]:
    """The record of both runs. `urls`: of the server of the fixed policy and of that of automatic control, which may be one.
    Nobody else uses them, and their /admin routes are open."""
    objectives = found.objectives
    auto = {"itl_ms": objectives.tpot, "ttft_ms": objectives.ttft, "min_accuracy": args.min_accuracy}
    capacity, most = found.fixed.capacity, found.cheapest.capacity
    assert capacity and most
    times, end = times_capacity(args.burst, capacity, most), args.before + args.peak_seconds
    records = []
    runs = ((FIXED, {"accuracy": args.accuracy}, found.fixed), (CONTROLLED, {"auto": auto}, found.cheapest))
    for url, (name, default, side) in zip(urls, runs, strict=True):
        async with _client(url) as http:
            (await http.put("/admin/routing/default", json=default)).raise_for_status()
        flags = [url, f"--name={name}", f"--rate={args.calm * capacity}", f"--peak={times * capacity}", "--poisson"]
        flags += [f"--peak-from={args.before}", f"--peak-seconds={args.peak_seconds}", f"--seed={args.seed}"]
        load = make_parser().parse_args([*flags, f"--seconds={end + args.after}"])
        load.routing, load.goodput, load.text = [parse_routing("default")], objectives, args.text
        load.prompt_tokens, load.output_tokens = args.prompt_tokens, args.output_tokens
        records.append(await measure(load, command))
        sizes = {"max_num_seqs": side.max_num_seqs, "max_queue": side.max_queue, "times_capacity": times}
        records[-1]["conditions"] |= {**sizes, "capacity_fixed": capacity, "capacity_cheapest": most}
    knob = records[1]["knob"]
    return {
        "benchmark": "burst",
        "command": command,
        "times_capacity": times,
        "calibration": found.to_dict(),
        "recovery_seconds": recovery_seconds(knob, end),
        "accuracy_before": mean_accuracy(knob, 0.0, args.before),
        "accuracy_after": mean_accuracy(knob, end, end + args.after),
        "runs": records,
        "conditions": conditions(),
    }


def recovery_seconds(knob: Sequence[dict[str, Any]], end: float) -> float | None:
    """How long after the burst's end the accuracy was 1 for the first time; None if it did not come back."""
    return next((each["at"] - end for each in knob if each["at"] >= end and each["accuracy"] == 1), None)


def mean_accuracy(knob: Sequence[dict[str, Any]], begin: float, end: float) -> float | None:
    """Of the default, in this time."""
    chosen = [each["accuracy"] for each in knob if begin <= each["at"] < end]
    return sum(chosen) / len(chosen) if chosen else None


async def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """The record, on servers that are started for it. With --calibrate, it has no runs."""
    if args.calibration is not None:
        found = Calibration.read(args.calibration)
    else:
        fixed = Side(FIXED, args.accuracy, args.fixed_max_num_seqs, args.fixed_max_queue)
        found = Calibration(args.goodput, fixed, Side("cheapest policy", args.min_accuracy, args.max_num_seqs, args.max_queue))
        async with _serving(args, MOST_PLACES, MOST_PLACES) as url, _client(url) as http:
            await find_sizes(http, args, found)
    sides = (found.fixed, found.cheapest)
    print(f"objectives: {asdict(found.objectives)}", file=sys.stderr)
    for side in sides:
        print(f"{side.name}: {side.max_num_seqs} places, a queue of {side.max_queue}", file=sys.stderr)
    first, second = (_serving(args, side.max_num_seqs or 0, side.max_queue or 0) for side in sides)
    async with first as one, second as other:
        for url, side in zip((one, other), sides, strict=True):
            if side.capacity is None:
                async with _client(url) as http:
                    await find_rate(http, args, side, found.objectives)
        check(*sides)
        if args.calibrate:
            return {"benchmark": "burst", "command": command, "calibration": found.to_dict(), "conditions": conditions()}
        return await play((one, other), args, found, command)


@asynccontextmanager
async def _serving(args: argparse.Namespace, places: int, queue: int) -> AsyncIterator[str]:
    serve = [sys.executable, "-m", "server", str(args.model), "--port={port}", "--insecure-admin", "--log-level=ERROR"]
    sizes = [f"--max-num-seqs={places}", f"--max-queue={queue}"]
    async with running(Server("server", shlex.join([*serve, *sizes, *args.flag]))) as url:
        yield url


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=512)
    return httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)


def burst_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a converted checkpoint with a frontier")
    parser.add_argument(
        "--goodput", nargs="+", default=[], metavar="ttft:MS", help="objectives: ttft:MS (2000) tpot:MS (found by two clients)"
    )
    parser.add_argument("--burst", type=float, help="times the capacity, in the burst (2, or less if that is too much)")
    parser.add_argument("--calm", type=float, default=0.5, help="times the capacity, before and after it")
    parser.add_argument("--before", type=float, default=20.0, help="seconds before the burst")
    parser.add_argument("--peak-seconds", type=float, default=60.0, help="how long the burst lasts")
    parser.add_argument("--after", type=float, default=30.0, help="seconds after the burst")
    parser.add_argument("--prompt-tokens", type=parse_lengths, default=Lengths(16, 16), metavar="LOW-HIGH")
    parser.add_argument("--output-tokens", type=parse_lengths, default=Lengths(64, 64), metavar="LOW-HIGH")
    parser.add_argument("--accuracy", type=float, default=1.0, help="of the fixed policy")
    parser.add_argument("--min-accuracy", type=float, default=0.0, help="the floor of automatic control")
    parser.add_argument("--headroom", type=float, default=1.15, help="times what two clients get, for the objective tpot")
    for places, queue, who in (
        ("--max-num-seqs", "--max-queue", "automatic control"),
        ("--fixed-max-num-seqs", "--fixed-max-queue", "the fixed policy"),
    ):
        parser.add_argument(places, type=int, help=f"places in the batch of {who} (found)")
        parser.add_argument(queue, type=int, help=f"requests that may wait for {who} (found)")
    parser.add_argument("--clients-requests", type=int, default=12, help="at least so many for each number of clients")
    parser.add_argument("--trial-requests", type=int, default=60, help="at least so many for each rate")
    parser.add_argument("--trial-seconds", type=float, default=30.0, help="each rate is tried at least so long")
    parser.add_argument(
        "--drift", type=float, default=DRIFT, help="two measurements of the same may differ by this factor (1.2)"
    )
    parser.add_argument("--calibrate", action="store_true", help="stop after the calibration")
    parser.add_argument("--calibration", type=Path, help="a record from which the calibration is taken")
    parser.add_argument("--text", type=Path, default=make_parser().get_default("text"), help="what prompts are cut from")
    parser.add_argument("--flag", action="append", default=[], help="a flag of the server, such as --flag=--quantize=int8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the record to a file")
    parser.add_argument("--html", type=Path, help="write a page with plots")
    parser.add_argument("--plot", type=Path, help="write the plots alone, as SVG")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = burst_parser()
    args = parser.parse_args(argv)
    try:
        args.goodput = parse_objectives(args.goodput)
        if args.goodput.e2el is not None:
            raise ValueError("--goodput: automatic control has the targets ttft and tpot only")
        args.goodput = replace(args.goodput, ttft=args.goodput.ttft or TTFT_MS)
        record = asyncio.run(run(args, command_line("burst", argv)))
    except (ValueError, OSError, httpx.HTTPError) as error:
        parser.error(str(error))
    if args.calibrate:
        finish(record, args.json)
        return
    one, other = record["runs"]
    print(f"the burst: {record['times_capacity']:.2f} times the capacity of the fixed policy")
    names = ("recovery_seconds", "accuracy_before", "accuracy_after")
    print("accuracy back at 1 after {} s; mean before {}, after {}".format(*(show(record[name]) for name in names)))
    print(f"{'in the burst':<26} {FIXED:>20} {CONTROLLED:>20}")
    for name in (*SHOWN, *SHOWN_TOO):
        print(f"{name:<26} {show(one['burst_figures'][name]):>20} {show(other['burst_figures'][name]):>20}")
    print("over all requests:")
    for row in table(other["figures"], one["figures"]):
        print(f"{row[0]:<26} {row[2]:>20} {row[1]:>20}")
    if args.plot is not None:
        write_text(args.plot, plot(other, one))
    finish(record, args.json, args.html, lambda: page(other, one))


if __name__ == "__main__":
    main()
