"""A burst of twice the capacity: the same requests under a fixed policy and under automatic control.

    python -m loadtests.burst MODEL --goodput ttft:2000 tpot:20 --html burst.html

The command starts a server and finds its capacity under the fixed policy: the most requests per second at which 90% of them
meet the objectives. For this, 1, 2, 3 ... clients ask again and again. Then requests arrive at half of the capacity, for a
minute at twice the capacity, and at half of it again. This is played with the fixed policy, and then under automatic control
with the objectives as its targets. Both get the same requests at the same times.
"""

import argparse
import asyncio
import shlex
import sys
from collections.abc import Sequence
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
SHOWN = ("requests", "completed", "errors", "good_share", "p50_ttft_ms", "p90_ttft_ms", "p90_tpot_ms", "mean_accuracy")


async def find_capacity(http: httpx.AsyncClient, args: argparse.Namespace) -> tuple[float, list[dict[str, Any]]]:
    """Requests per second, and the figures for each number of clients.

    Raises ValueError if one client alone misses the objectives.
    """
    text = args.text.read_text(encoding="utf-8")[:MAX_TEXT]
    tokens = (await http.post("/tokenize", json={"prompt": text})).raise_for_status().json()["tokens"]
    context = args.prompt_tokens.high + args.output_tokens.high + 1

    async def figures(clients: int) -> dict[str, Any]:
        arrivals = [Arrival(0.0)] * max(args.capacity_requests, 4 * clients)
        lengths = args.prompt_tokens, args.output_tokens
        planned = plan(arrivals, tokens, *lengths, [parse_routing("default")], 0.0, context, args.seed + clients)
        return {"clients": clients, **summary(await Client(http).run_closed(planned, clients), args.goodput)}

    await figures(2)  # warm-up
    tried: list[dict[str, Any]] = []
    for clients in range(1, args.max_num_seqs + args.max_queue + 1):
        tried.append(await figures(clients))
        print(f"{clients} clients: {_short(tried[-1])}", file=sys.stderr)
        if tried[-1]["good_share"] < ENOUGH:
            break
    fast_enough = [each["request_throughput"] for each in tried if each["good_share"] >= ENOUGH]
    if not fast_enough:
        raise ValueError("--goodput: one client alone misses the objectives under the fixed policy")
    return max(fast_enough), tried


def recovery_seconds(knob: Sequence[dict[str, Any]], end: float) -> float | None:
    """How long after the burst's end the accuracy was last below 1; None if it never came back."""
    low = [each["at"] for each in knob if each["accuracy"] is not None and each["accuracy"] < 1]
    if not low:
        return 0.0
    return None if low[-1] == knob[-1]["at"] else max(low[-1] - end, 0.0)


async def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """The record of both runs, on a server that is started for them."""
    serve = [sys.executable, "-m", "server", str(args.model), "--port={port}", "--insecure-admin", "--log-level=ERROR"]
    serve += [f"--max-num-seqs={args.max_num_seqs}", f"--max-queue={args.max_queue}", *args.flag]
    async with running(Server("server", shlex.join(serve))) as url:
        return await play(url, args, command)


async def play(url: str, args: argparse.Namespace, command: str) -> dict[str, Any]:
    """The record of both runs, on a server that nobody else uses and whose /admin routes are open."""
    objectives: Objectives = args.goodput
    fixed = {"accuracy": args.accuracy}
    auto = {"itl_ms": objectives.tpot, "ttft_ms": objectives.ttft, "min_accuracy": args.min_accuracy}
    async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as http:
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
    parser.add_argument("--goodput", nargs="+", default=["ttft:2000"], metavar="ttft:MS", help="objectives: ttft:MS tpot:MS")
    parser.add_argument("--burst", type=float, default=2.0, help="times the capacity, in the burst")
    parser.add_argument("--calm", type=float, default=0.5, help="times the capacity, before and after it")
    parser.add_argument("--before", type=float, default=20.0, help="seconds before the burst")
    parser.add_argument("--peak-seconds", type=float, default=60.0, help="how long the burst lasts")
    parser.add_argument("--after", type=float, default=30.0, help="seconds after the burst")
    parser.add_argument("--prompt-tokens", type=parse_lengths, default=Lengths(16, 16), metavar="LOW-HIGH")
    parser.add_argument("--output-tokens", type=parse_lengths, default=Lengths(64, 64), metavar="LOW-HIGH")
    parser.add_argument("--accuracy", type=float, default=1.0, help="of the fixed policy")
    parser.add_argument("--min-accuracy", type=float, default=0.0, help="the floor of automatic control")
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--max-queue", type=int, default=32)
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
        if args.goodput.e2el is not None or args.goodput == Objectives():
            raise ValueError("--goodput: automatic control needs ttft, tpot or both, and knows no other targets")
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
