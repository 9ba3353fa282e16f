"""Mixed traffic for minutes or hours: no error of the server, flat memory, nothing left behind, exact counters.

    python -m loadtests.soak MODEL                    # ten minutes
    python -m loadtests.soak MODEL --seconds 3600
    python -m loadtests.soak MODEL --seconds 3600 --rest 2     # clients rest, so the load is light

The command starts a server and sends it everything at once: streams and whole answers, every endpoint and kind of routing,
phases, tools, structured output, deadlines, wrong requests, and clients that leave at any moment. Meanwhile an operator swaps
the default, turns automatic control on and off, stores and removes policies, and runs canaries. At the end, what the clients
counted is compared with the server's metrics. Exit code 0: every check passed. The last line is JSON.
"""

import argparse
import asyncio
import json
import random
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from ladimo.checkpoint import read_config
from loadtests.common.conditions import OtherLoad, conditions
from loadtests.common.records import command_line, finish
from loadtests.load.servers import Server, running
from loadtests.load_test import TEXT
from loadtests.soaking.asks import Asks
from loadtests.soaking.ledger import Check, Counters, Ledger, at_rest
from loadtests.soaking.people import Operator, Visitor

# Few places and a small KV cache, so that requests wait, are refused, and are sent back to the queue.
FLAGS = ["--insecure-admin", "--max-num-seqs=8", "--max-queue=24", "--kv-cache-blocks=96", "--shadow-share=0.2"]
MAX_MODEL_LEN = 1024
MEMORY_SECONDS = 1.0  # between two readings of the server's memory; shorter in a short test
REST_SECONDS = 60.0  # for the server to come to rest
ERROR_LEVELS = ("error", "critical")


@dataclass(frozen=True, slots=True)
class Plan:
    """`memory_mib`: how much the server's memory may grow. `pause`: the operator's mean seconds between two actions. `rest`:
    a client's mean seconds between two visits."""

    seconds: float
    clients: int
    longest: int = 48
    pause: float = 1.0
    rest: float = 0.0
    memory_mib: float = 24.0
    seed: int = 0


async def soak(http: httpx.AsyncClient, plan: Plan) -> tuple[Ledger, list[Check]]:
    """Use a server that nobody else uses, for so long. Returns what the clients saw, and whether all is well."""
    ledger, text = Ledger(), TEXT.read_text(encoding="utf-8")
    model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
    operator = Operator(http, ledger, random.Random(plan.seed))
    await operator.prepare()
    before, started = await _read(http), time.monotonic()

    async def client(number: int) -> None:
        chance = random.Random(f"{plan.seed} {number}")
        visitor = Visitor(http, Asks(chance, text, model, plan.longest), ledger, chance)
        while time.monotonic() < started + plan.seconds:
            await visitor.visit()
            if plan.rest:
                await asyncio.sleep(chance.expovariate(1 / plan.rest))

    memory: list[tuple[float, float]] = []
    over = asyncio.Event()

    async def clients() -> None:
        await asyncio.gather(*(client(number) for number in range(plan.clients)))
        over.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(clients())
        group.create_task(operator.work(plan.pause, over))
        group.create_task(_watch_memory(http, memory, started, plan, over))
    await operator.finish()
    await _idle(http)
    # Gauges of the engine show its last step. A last request brings them up to date.
    last = Visitor(http, Asks(random.Random(plan.seed), text, model, plan.longest), ledger, random.Random(plan.seed))
    await last.visit_once()
    after = await _read(http)
    checks = [
        Check(
            "answers as expected", not ledger.unexpected, "; ".join(ledger.unexpected[:3]) or str(sum(ledger.kinds.values()))
        ),
        at_rest(after),
        *ledger.checks(before, after),
        memory_check(memory, plan.seconds, plan.memory_mib),
    ]
    return ledger, checks


def memory_check(samples: Sequence[tuple[float, float]], seconds: float, limit_mib: float) -> Check:
    """Whether the memory is flat. `samples`: (time, MiB). The first third of the time warms up; of the rest, the last quarter
    is compared with the first."""
    begin, quarter = seconds / 3, seconds / 6
    early = [size for at, size in samples if begin <= at < begin + quarter]
    late = [size for at, size in samples if at >= seconds - quarter]
    if not early or not late:
        return Check("memory is flat", False, "the time was too short to measure it")
    grown = median(late) - median(early)
    found = f"{median(early):.0f} MiB after the warm-up, {median(late):.0f} MiB at the end; at most {limit_mib:g} more"
    return Check("memory is flat", grown <= limit_mib, found)


def log_check(text: str) -> Check:
    """Whether a log without a terminal, one JSON object a line, has no error and no traceback."""
    wrong = []
    for line in text.splitlines():
        entry: dict[str, Any] = {}
        with suppress(ValueError):
            entry = json.loads(line)
        if entry.get("level") in ERROR_LEVELS or "Traceback" in line:
            wrong.append(line)
    return Check("no errors in the log", not wrong, f"{len(wrong)} lines, the first: {wrong[0][:500]}" if wrong else "0")


async def _read(http: httpx.AsyncClient) -> Counters:
    return Counters((await http.get("/metrics")).raise_for_status().text)


async def _watch_memory(
    http: httpx.AsyncClient, samples: list[tuple[float, float]], started: float, plan: Plan, over: asyncio.Event
) -> None:
    while not over.is_set():
        page = (await http.get("/metrics")).raise_for_status().text
        found = re.search(r"^process_resident_memory_bytes (\S+)$", page, re.M)
        assert found is not None
        samples.append((time.monotonic() - started, float(found[1]) / 2**20))
        await asyncio.sleep(min(MEMORY_SECONDS, plan.seconds / 30))


async def _idle(http: httpx.AsyncClient) -> None:
    """Wait until no request is in the server, or until REST_SECONDS have passed."""
    with suppress(TimeoutError):
        async with asyncio.timeout(REST_SECONDS):
            while (await _read(http)).total("ladimo_requests_in_flight"):
                await asyncio.sleep(0.2)


async def measure(args: argparse.Namespace, log: Path) -> tuple[Ledger, list[Check], float]:
    context = min(MAX_MODEL_LEN, read_config(args.model).max_position_embeddings)
    command = [sys.executable, "-m", "server", str(args.model), "--port={port}", f"--max-model-len={context}", *FLAGS]
    plan = Plan(args.seconds, args.clients, rest=args.rest, memory_mib=args.memory_mib, seed=args.seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with (
        running(Server("server", shlex.join([*command, *args.flag])), log=log) as url,
        # A request of the tier `flex` may wait for minutes on a busy machine. The end of the test shows whether it hangs.
        httpx.AsyncClient(base_url=url, timeout=plan.seconds + REST_SECONDS, limits=limits, trust_env=False) as http,
    ):
        other, started = OtherLoad(), time.perf_counter()
        ledger, checks = await soak(http, plan)
        busy = other.cores(time.perf_counter() - started)
    return ledger, [*checks, log_check(log.read_text(encoding="utf-8"))], busy


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a converted checkpoint with a frontier")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long clients ask")
    parser.add_argument("--clients", type=int, default=16, help="clients at a time")
    parser.add_argument("--rest", type=float, default=0.0, help="a client's mean seconds between two visits")
    parser.add_argument(
        "--memory-mib", type=float, default=24.0, help="how much the server's memory may grow after the warm-up"
    )
    parser.add_argument("--flag", action="append", default=[], help="a flag of the server, such as --flag=--quantize=int8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="keep the server's log in this file")
    parser.add_argument("--json", type=Path, help="write the record to a file")
    args = parser.parse_args(argv)
    with TemporaryDirectory() as temporary:
        try:
            ledger, checks, busy = asyncio.run(measure(args, args.log or Path(temporary) / "log"))
        except (ValueError, OSError, httpx.HTTPError) as error:
            parser.error(str(error))
    for check in checks:
        print(f"{'ok' if check.passed else 'FAILED':<6}  {check.name:<46} {check.found}")
    record = {
        "benchmark": "soak",
        "command": command_line("soak", argv),
        "passed": all(check.passed for check in checks),
        "requests": dict(sorted(ledger.kinds.items())),
        "checks": [asdict(check) for check in checks],
        "conditions": {**conditions(), "server_and_other_load_cores": round(busy, 2), "seed": args.seed},
    }
    finish(record, args.json)
    sys.exit(0 if record["passed"] else 1)


if __name__ == "__main__":
    main()
