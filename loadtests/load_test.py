"""Open-loop load on a running server, with figures in the terms of `vllm bench serve`.

    python -m loadtests.load_test URL --rate 5 --seconds 60                             # constant
    python -m loadtests.load_test URL --rate 5 --seconds 60 --poisson
    python -m loadtests.load_test URL --rate 5 --peak 20 --peak-from 30 --peak-seconds 60 --seconds 150
    python -m loadtests.load_test URL --rate 1 --ramp-to 30 --seconds 120
    python -m loadtests.load_test URL --trace azure.csv --speed 2 --seconds 120

Two runs with the same flags and seed send the same requests at the same times. `--compare` sets a run beside an earlier one.
Latencies count from the time at which a request was due. What this adds to guidellm and `vllm bench serve`: bursts, ramps,
cancellations, mixed policies, and the accuracy that each answer was given. For anything else, use these. `loadtests.sweep`
is the closed loop: it keeps a number of clients busy.
"""

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from ladimo.checkpoint import read_json, write_text
from loadtests.common.conditions import OtherLoad, conditions
from loadtests.common.records import command_line, finish
from loadtests.load.arrivals import Arrival, arrivals, burst, constant, ramp, trace
from loadtests.load.client import Client, Outcome
from loadtests.load.figures import Objectives, parse_objectives, summary, table
from loadtests.load.page import page, plot, timeline
from loadtests.load.steps import read_samples, step_figures
from loadtests.load.workload import Lengths, parse_lengths, parse_routing, plan

TEXT = Path(__file__).parents[1] / "README.md"
MAX_TEXT = 200_000  # characters


def add_schedule(parser: argparse.ArgumentParser) -> None:
    """Flags for `schedule`."""
    parser.add_argument("--seconds", type=float, default=60.0, help="how long requests arrive")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument("--poisson", action="store_true", help="random gaps; without it, equal ones")
    parser.add_argument("--peak", type=float, help="the rate of a burst")
    parser.add_argument("--peak-from", type=float, default=30.0, help="when the burst begins, in seconds")
    parser.add_argument("--peak-seconds", type=float, default=60.0, help="how long it lasts")
    parser.add_argument("--ramp-to", type=float, help="the rate at the end; it rises or falls steadily")
    parser.add_argument("--trace", type=Path, help="a CSV of Azure's LLM traces: its times and lengths")
    parser.add_argument("--speed", type=float, default=1.0, help="how many times faster the trace is replayed")


def schedule(args: argparse.Namespace) -> list[Arrival]:
    if args.trace is not None:
        return trace(args.trace, args.seconds, args.speed)
    rate = constant(args.rate)
    if args.peak is not None:
        rate = burst(args.rate, args.peak, args.peak_from, args.peak_seconds)
    elif args.ramp_to is not None:
        rate = ramp(args.rate, args.ramp_to, args.seconds)
    return arrivals(rate, args.seconds, args.seed, args.poisson)


async def measure(args: argparse.Namespace, command: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=512)
    async with httpx.AsyncClient(base_url=args.url, timeout=None, limits=limits, headers=headers, trust_env=False) as http:
        model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]
        text = args.text.read_text(encoding="utf-8")[:MAX_TEXT]
        tokens = (await http.post("/tokenize", json={"prompt": text})).raise_for_status().json()["tokens"]
        context = model.get("max_model_len") or 2048
        planned = plan(
            schedule(args), tokens, args.prompt_tokens, args.output_tokens, args.routing, args.cancelled, context, args.seed
        )
        if not planned:
            raise ValueError("no request arrives in this time")
        before, other, started = await read_samples(http), OtherLoad(), time.perf_counter()
        outcomes, knobs = await Client(http, args.deadline).run(planned)
        busy = other.cores(time.perf_counter() - started)
        steps = step_figures(before, await read_samples(http))
    objectives: Objectives = args.goodput
    met = [objectives.met(outcome) for outcome in outcomes]
    return {
        "benchmark": "load_test",
        "name": args.name,
        "command": command,
        "model": model["id"],
        "objectives": asdict(objectives),
        "figures": {**summary(outcomes, objectives), **steps},
        "burst_figures": _burst_figures(args, outcomes),
        "timeline": timeline(outcomes, met, args.seconds),
        "knob": [asdict(knob) for knob in knobs],
        "conditions": {**conditions(), "server_and_other_load_cores": round(busy, 2), "seed": args.seed},
    }


def _burst_figures(args: argparse.Namespace, outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    if args.peak is None:
        return None
    return summary(outcomes, args.goodput, args.peak_from, args.peak_from + args.peak_seconds)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the server's address, such as http://127.0.0.1:8000")
    add_schedule(parser)
    parser.add_argument("--prompt-tokens", type=parse_lengths, default=Lengths(64, 64), metavar="LOW-HIGH")
    parser.add_argument("--output-tokens", type=parse_lengths, default=Lengths(32, 32), metavar="LOW-HIGH")
    parser.add_argument(
        "--routing",
        type=parse_routing,
        action="append",
        metavar="NAME=SHARE",
        help="what requests ask for: default, a policy, auto, auto:FLOOR or accuracy:X, with their shares; may be repeated",
    )
    parser.add_argument("--cancelled", type=float, default=0.0, help="the share of clients that leave before the end")
    parser.add_argument("--deadline", type=float, help="seconds, sent as X-Request-Timeout")
    parser.add_argument("--goodput", nargs="+", default=[], metavar="ttft:MS", help="objectives: ttft:MS tpot:MS e2el:MS")
    parser.add_argument("--text", type=Path, default=TEXT, help="what prompts are cut from")
    parser.add_argument("--api-key", help="the server's key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="run", help="the name of this run in tables and plots")
    parser.add_argument("--html", type=Path, help="write a page with plots")
    parser.add_argument("--plot", type=Path, help="write the plots alone, as SVG")
    parser.add_argument("--json", type=Path, help="write the record to a file, for --compare")
    parser.add_argument("--compare", type=Path, help="the record of an earlier run, which is set beside this one")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    args.routing = args.routing or [parse_routing("default")]
    try:
        args.goodput = parse_objectives(args.goodput)
        earlier = None if args.compare is None else read_json(args.compare)
        record = asyncio.run(measure(args, command_line("load_test", argv)))
    except (ValueError, OSError, httpx.HTTPError) as error:
        parser.error(str(error))
    for row in table(record["figures"], None if earlier is None else earlier["figures"]):
        print(f"{row[0]:<26} " + " ".join(f"{cell:>14}" for cell in row[1:]))
    if args.plot is not None:
        write_text(args.plot, plot(record, earlier))
    finish(record, args.json, args.html, lambda: page(record, earlier))


if __name__ == "__main__":
    main()
