"""A burst of twice the capacity: the same requests under a fixed policy and under automatic control.

    python -m loadtests.burst MODEL --html burst.html

What the flags leave open is found first, on a server of its own:

- The objective of the time per token is what two clients at a time get under the fixed policy, times `--headroom` (1.15). One
  client alone would give too strict an objective: at half of the capacity requests already overlap, and would miss it.
- The places in the batch: the most clients at a time that still meet it under the cheapest policy.
- The length of the queue: what the cheapest policy completes within the objective of the first token.

Then the command starts the server and finds its capacity under the fixed policy: the most requests per second at which 90% of
them meet the objectives. For this, 1, 2, 3 ... clients ask again and again. Then requests arrive at half of the capacity, for a
minute at twice the capacity, and at half of it again. This is played with the fixed policy, and then under automatic control
with the objectives as its targets. Both get the same requests at the same times.
"""

import argparse
import asyncio
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx

from ladimo.checkpoint import write_text
from loadtests.common.conditions import conditions
from loadtests.common.records import command_line, finish
from loadtests.load.arrivals import Arrival
from loadtests.load.client import Client
from loadtests.load.figures import Objectives, parse_objectives, show, summary, table
from loadtests.load.page import page, plot
from loadtests.load.servers import Server, running
from loadtests.load.workload import Lengths, parse_lengths, parse_routing, plan
from loadtests.load_test import MAX_TEXT, make_parser, measure

FIXED, CONTROLLED = "fixed policy", "automatic control"
ENOUGH = 0.9  # of the requests inside the objectives
OVERLAPPING = 2  # clients at a time from which the objective of the time per token follows
MOST_PLACES = 16  # that are tried
TTFT_MS = 2000.0  # unless it is given
SHOWN = ("requests", "completed", "errors", "good_share", "p50_ttft_ms", "p90_ttft_ms", "p90_tpot_ms", "mean_accuracy")


async def find_capacity(http: httpx.AsyncClient, args: argparse.Namespace) -> tuple[float, list[dict[str, Any]]]:
    """Requests per second, and the figures for each number of clients.

    Raises ValueError if one client alone misses the objectives.
    """
    await _closed_loop(http, args, 2)  # warm-up
    tried: list[dict[str, Any]] = []
    for clients in range(1, args.max_num_seqs + args.max_queue + 1):
        tried.append(await _closed_loop(http, args, clients))
        if tried[-1]["good_share"] < ENOUGH:
            break
    fast_enough = [each["request_throughput"] for each in tried if each["good_share"] >= ENOUGH]
    if not fast_enough:
        raise ValueError("--goodput: one client alone misses the objectives under the fixed policy")
    return max(fast_enough), tried


async def _closed_loop(http: httpx.AsyncClient, args: argparse.Namespace, clients: int) -> dict[str, Any]:
    """The figures of so many clients that ask again and again."""
    text = args.text.read_text(encoding="utf-8")[:MAX_TEXT]
    tokens = (await http.post("/tokenize", json={"prompt": text})).raise_for_status().json()["tokens"]
    context = args.prompt_tokens.high + args.output_tokens.high + 1
    arrivals, lengths = [Arrival(0.0)] * max(args.capacity_requests, 4 * clients), (args.prompt_tokens, args.output_tokens)
    planned = plan(arrivals, tokens, *lengths, [parse_routing("default")], 0.0, context, args.seed + clients)
    figures = {"clients": clients, **summary(await Client(http).run_closed(planned, clients), args.goodput)}
    print(f"{clients} clients: {_short(figures)}", file=sys.stderr)
    return figures


async def calibrate(http: httpx.AsyncClient, args: argparse.Namespace, most: int = MOST_PLACES) -> list[dict[str, Any]]:
    """Find the objective of the time per token, the places and the length of the queue, where `args` has None. Returns the
    figures from which they were chosen.

    `most`: places that are tried; the server must have so many. Raises ValueError if the cheapest policy misses the objectives
    with one client.
    """
    found: list[dict[str, Any]] = []
    await _set_default(http, {"accuracy": args.accuracy})
    await _closed_loop(http, args, OVERLAPPING)  # warm-up
    if args.goodput.tpot is None:
        found.append({"accuracy": args.accuracy, **await _closed_loop(http, args, OVERLAPPING)})
        args.goodput = replace(args.goodput, tpot=round(args.headroom * found[-1]["p90_tpot_ms"], 1))
    await _set_default(http, {"accuracy": args.min_accuracy})
    cheapest: list[dict[str, Any]] = []
    for clients in [args.max_num_seqs] if args.max_num_seqs else range(1, most + 1):
        figures = await _closed_loop(http, args, clients)
        if args.max_num_seqs is None and figures["good_share"] < ENOUGH:
            break
        cheapest.append({"accuracy": args.min_accuracy, **figures})
    if not cheapest:
        raise ValueError("--goodput: one client alone misses the objectives under the cheapest policy")
    args.max_num_seqs = args.max_num_seqs or cheapest[-1]["clients"]
    if args.max_queue is None:
        args.max_queue = max(math.ceil(cheapest[-1]["request_throughput"] * args.goodput.ttft / 1000), 1)
    return found + cheapest


def recovery_seconds(knob: Sequence[dict[str, Any]], end: float) -> float | None:
    """How long after the burst's end the accuracy was last below 1; None if it never came back."""
    low = [each["at"] for each in knob if each["accuracy"] is not None and each["accuracy"] < 1]
    if not low:
        return 0.0
    return None if low[-1] == knob[-1]["at"] else max(low[-1] - end, 0.0)


async def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """The record of both runs, on a server that is started for them."""
    calibration: list[dict[str, Any]] = []
    if None in (args.goodput.tpot, args.max_num_seqs, args.max_queue):
        async with running(_server(args, MOST_PLACES, MOST_PLACES)) as url, _client(url) as http:
            calibration = await calibrate(http, args)
    chosen = {"objectives": asdict(args.goodput), "max_num_seqs": args.max_num_seqs, "max_queue": args.max_queue}
    print(f"chosen: {chosen}", file=sys.stderr)
    async with running(_server(args, args.max_num_seqs, args.max_queue)) as url:
        return {**await play(url, args, command), "calibration": calibration, **chosen}


def _server(args: argparse.Namespace, places: int, queue: int) -> Server:
    serve = [sys.executable, "-m", "server", str(args.model), "--port={port}", "--insecure-admin", "--log-level=ERROR"]
    return Server("server", shlex.join([*serve, f"--max-num-seqs={places}", f"--max-queue={queue}", *args.flag]))


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=None, trust_env=False)


async def play(url: str, args: argparse.Namespace, command: str) -> dict[str, Any]:
    """The record of both runs, on a server that nobody else uses and whose /admin routes are open."""
    objectives: Objectives = args.goodput
    fixed = {"accuracy": args.accuracy}
    auto = {"itl_ms": objectives.tpot, "ttft_ms": objectives.ttft, "min_accuracy": args.min_accuracy}
    async with _client(url) as http:
        await _set_default(http, fixed)
        capacity, tried = await find_capacity(http, args)
        records = []
        for name, default in ((FIXED, fixed), (CONTROLLED, {"auto": auto})):
            await _set_default(http, default)
            flags = [url, f"--name={name}", f"--rate={args.calm * capacity}", f"--peak={args.burst * capacity}", "--poisson"]
            flags += [f"--peak-from={args.before}", f"--peak-seconds={args.peak_seconds}", f"--seed={args.seed}"]
            flags += [f"--seconds={args.before + args.peak_seconds + args.after}"]
            load = make_parser().parse_args(flags)
            load.routing, load.goodput, load.text = [parse_routing("default")], objectives, args.text
            load.prompt_tokens, load.output_tokens = args.prompt_tokens, args.output_tokens
            records.append(await measure(load, command))
    one, other = records
    return {
        "benchmark": "burst",
        "command": command,
        "capacity": capacity,
        "capacity_figures": tried,
        "recovery_seconds": recovery_seconds(other["knob"], args.before + args.peak_seconds),
        "runs": [one, other],
        "conditions": conditions(),
    }


async def _set_default(http: httpx.AsyncClient, default: dict[str, Any]) -> None:
    (await http.put("/admin/routing/default", json=default)).raise_for_status()


def _short(figures: dict[str, Any]) -> str:
    names = ("request_throughput", "good_share", "p90_ttft_ms", "p90_tpot_ms")
    return ", ".join(f"{name} {show(figures[name])}" for name in names)


def burst_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a converted checkpoint with a frontier")
    parser.add_argument(
        "--goodput", nargs="+", default=[], metavar="ttft:MS", help="objectives: ttft:MS (2000) tpot:MS (found by two clients)"
    )
    parser.add_argument("--burst", type=float, default=2.0, help="times the capacity, in the burst")
    parser.add_argument("--calm", type=float, default=0.5, help="times the capacity, before and after it")
    parser.add_argument("--before", type=float, default=20.0, help="seconds before the burst")
    parser.add_argument("--peak-seconds", type=float, default=60.0, help="how long the burst lasts")
    parser.add_argument("--after", type=float, default=30.0, help="seconds after the burst")
    parser.add_argument("--prompt-tokens", type=parse_lengths, default=Lengths(16, 16), metavar="LOW-HIGH")
    parser.add_argument("--output-tokens", type=parse_lengths, default=Lengths(64, 64), metavar="LOW-HIGH")
    parser.add_argument("--accuracy", type=float, default=1.0, help="of the fixed policy")
    parser.add_argument("--min-accuracy", type=float, default=0.0, help="the floor of automatic control")
    parser.add_argument("--headroom", type=float, default=1.15, help="times what two clients get, for the objective tpot")
    parser.add_argument("--max-num-seqs", type=int, help="places in the batch (found by the objectives)")
    parser.add_argument("--max-queue", type=int, help="requests that may wait (found by the objectives)")
    parser.add_argument("--capacity-requests", type=int, default=12, help="at least so many for each number of clients")
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
    one, other = record["runs"]
    print(
        f"capacity: {record['capacity']:.2f} requests per second; accuracy back at 1 after {show(record['recovery_seconds'])} s"
    )
    print(f"{'in the burst':<26} {FIXED:>20} {CONTROLLED:>20}")
    for name in SHOWN:
        print(f"{name:<26} {show(one['burst_figures'][name]):>20} {show(other['burst_figures'][name]):>20}")
    print("over all requests:")
    for row in table(other["figures"], one["figures"]):
        print(f"{row[0]:<26} {row[2]:>20} {row[1]:>20}")
    if args.plot is not None:
        write_text(args.plot, plot(other, one))
    finish(record, args.json, args.html, lambda: page(other, one))


if __name__ == "__main__":
    main()
