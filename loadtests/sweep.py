"""Closed-loop load: so many clients at a time, each of which asks again when it has its answer. Several servers side by side.

    python -m loadtests.sweep ladimo=http://127.0.0.1:8000 --clients 1 8 32
    python -m loadtests.sweep "ladimo=ladimo-server MODEL --port {port}" \\
        "llama.cpp=llama-server -m model.gguf --port {port} -np 32 -c 8192" --clients 1 8 32

A server is an address, or a command that starts it on the port {port}. All servers get the same prompts, as token ids of the
first one, so they must have the same tokenizer. The first server must be ours, because others do not tell token ids in the same
way. Each number of clients is measured on every server before the next one, `--rounds` times, so that changes of the machine
meet all of them. Tables show the median round.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx

from ladimo.convert.report.document import Document, Section, Table
from ladimo.convert.report.page import to_page
from loadtests.common.conditions import OtherLoad, conditions
from loadtests.common.records import command_line, finish
from loadtests.load.arrivals import Arrival
from loadtests.load.client import Client
from loadtests.load.figures import Objectives, show, summary
from loadtests.load.servers import Server, parse_server, running
from loadtests.load.steps import read_samples, step_figures
from loadtests.load.workload import Lengths, parse_lengths, parse_routing, plan
from loadtests.load_test import MAX_TEXT, TEXT

COLUMNS = {
    "output_throughput": "tokens/s",
    "request_throughput": "requests/s",
    "p50_ttft_ms": "TTFT p50",
    "p90_ttft_ms": "TTFT p90",
    "p99_ttft_ms": "TTFT p99",
    "p50_itl_ms": "ITL p50",
    "p90_itl_ms": "ITL p90",
    "p99_itl_ms": "ITL p99",
    "mean_tpot_ms": "TPOT mean",
    "mean_accuracy": "accuracy",
    "tokens_per_step": "tokens/step",
    "distinct_experts_per_step": "experts/step",
    "gigabytes_per_step": "GB/step",
    "errors": "errors",
}
TYPICAL = "output_throughput"  # the median round is chosen by it
WARM_UP_REQUESTS = 2


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    async with AsyncExitStack() as stack:
        clients: dict[str, httpx.AsyncClient] = {}
        for server in args.servers:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=512)
            url = await stack.enter_async_context(running(server))
            http = httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)
            clients[server.name] = await stack.enter_async_context(http)
        first = clients[args.servers[0].name]
        text = args.text.read_text(encoding="utf-8")[:MAX_TEXT]
        tokens = (await first.post("/tokenize", json={"prompt": text})).raise_for_status().json()["tokens"]
        for http in clients.values():
            await Client(http, seeded=args.seeds).run_closed(_planned(args, tokens, WARM_UP_REQUESTS, -1), 1)
        rows = []
        for number in args.clients:
            for round_number in range(args.rounds):
                for name, http in clients.items():
                    rows.append(await _run(args, tokens, name, http, number, round_number))
                    print(_progress(rows[-1]), file=sys.stderr)
        return rows


async def _run(
    args: argparse.Namespace, tokens: Sequence[int], name: str, http: httpx.AsyncClient, clients: int, round_number: int
) -> dict[str, Any]:
    requests = max(args.requests, args.requests_per_client * clients)
    planned = _planned(args, tokens, requests, round_number)  # the same for every server, others in every round
    before, other, started = await read_samples(http), OtherLoad(), time.perf_counter()
    outcomes = await Client(http, seeded=args.seeds).run_closed(planned, clients)
    busy = other.cores(time.perf_counter() - started)
    figures = {**summary(outcomes, Objectives()), **step_figures(before, await read_samples(http))}
    return {"server": name, "clients": clients, "round": round_number, "server_and_other_load_cores": busy, "figures": figures}


def _planned(args: argparse.Namespace, tokens: Sequence[int], requests: int, round_number: int) -> list[Any]:
    arrivals = [Arrival(0.0)] * requests
    seed = args.seed + 1000 * round_number
    context = args.prompt_tokens.high + args.output_tokens.high + 1
    return plan(arrivals, tokens, args.prompt_tokens, args.output_tokens, args.routing, args.cancelled, context, seed)


def typical(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each server and number of clients, the round with the median throughput, in the order of the rows."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["clients"], row["server"]), []).append(row)
    chosen = []
    for group in groups.values():
        middle = statistics.median_low([row["figures"][TYPICAL] or 0.0 for row in group])
        chosen.append(next(row for row in group if (row["figures"][TYPICAL] or 0.0) == middle))
    return chosen


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The header and one row for each server and number of clients. Columns without any value are left out."""
    kept = [name for name in COLUMNS if any(row["figures"][name] for row in rows)]
    header = ["clients", "server", *(COLUMNS[name] for name in kept)]
    return [header, *([str(row["clients"]), row["server"], *(show(row["figures"][name]) for name in kept)] for row in rows)]


def _progress(row: dict[str, Any]) -> str:
    figures = row["figures"]
    return f"{row['clients']} clients, round {row['round']}, {row['server']}: {show(figures[TYPICAL])} tokens/s"


def page(record: dict[str, Any], cells: list[list[str]]) -> str:
    every = [[str(row["round"]), *cell] for row, cell in zip(record["rows"], table(record["rows"])[1:], strict=True)]
    sections = [
        Section("Median round", ["Latencies in milliseconds."], [Table(cells[0], cells[1:])]),
        Section("All rounds", [], [Table(["round", *table(record["rows"])[0]], every)]),
        Section("Servers", [], [Table(["server", "address or command"], [list(pair) for pair in record["servers"].items()])]),
        Section("Conditions", [], [Table(["condition", "value"], [[k, show(v)] for k, v in record["conditions"].items()])]),
    ]
    return to_page(Document("Closed-loop sweep", [record["command"]], [], sections))


def _server(text: str) -> Server:
    try:
        return parse_server(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", type=_server, metavar="NAME=SERVER")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32], help="numbers of clients to try")
    parser.add_argument("--requests", type=int, default=16, help="at least so many requests for each number of clients")
    parser.add_argument("--requests-per-client", type=int, default=4, help="and at least so many for each client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=parse_lengths, default=Lengths(128, 128), metavar="LOW-HIGH")
    parser.add_argument("--output-tokens", type=parse_lengths, default=Lengths(64, 64), metavar="LOW-HIGH")
    parser.add_argument("--routing", type=parse_routing, action="append", metavar="NAME=SHARE", help="see loadtests.load_test")
    parser.add_argument("--cancelled", type=float, default=0.0, help="the share of clients that leave before the end")
    parser.add_argument("--text", type=Path, default=TEXT, help="what prompts are cut from")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, lengths and what clients do")
    parser.add_argument(
        "--no-seeds", dest="seeds", action="store_false", help="requests without a seed: vLLM on CPUs can fail on it"
    )
    parser.add_argument("--json", type=Path, help="write the record to a file")
    parser.add_argument("--html", type=Path, help="write a page")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    args.routing = args.routing or [parse_routing("default")]
    try:
        rows = asyncio.run(measure(args))
    except (ValueError, OSError, httpx.HTTPError) as error:
        parser.error(str(error))
    record = {
        "benchmark": "sweep",
        "command": command_line("sweep", argv),
        "servers": {server.name: server.address for server in args.servers},
        "rows": rows,
        "conditions": {**conditions(), "seed": args.seed},
    }
    cells = table(typical(rows))
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    finish(record, args.json, args.html, lambda: page(record, cells))


if __name__ == "__main__":
    main()
