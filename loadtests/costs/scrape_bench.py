"""The cost of scraping /metrics: throughput of a busy server with and without a scrape every second, and CPU time per scrape.

    python -m loadtests.costs.scrape_bench MODEL [--clients 4] [--seconds 2] [--rounds 150] [--every 1]

The server runs in its own process, under a load that never pauses. Rounds with scrapes and rounds without alternate (AB, BA,
AB, ...). Rounds are short, so that changes in the machine's speed affect both kinds alike. There are many, so that the interval
is narrow. The result is the ratio of all rounds with scrapes to all rounds without, with a 95% interval from resampling the
pairs. The readings between rounds are scrapes, too, but equally many for both kinds. If other programs use the machine, CPU
time per token says more than tokens per second.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from ladimo.checkpoint import read_config, read_policies
from loadtests.common.conditions import OtherLoad, conditions

ARMS = ("quiet", "scraped")
START_SECONDS = 120


@dataclass(frozen=True)
class Reading:
    """The time on this process's clock, and the server's tokens and CPU seconds so far."""

    at: float
    tokens: float
    cpu: float


@dataclass(frozen=True)
class Round:
    seconds: float
    tokens: float
    cpu_milliseconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Estimate:
    """The ratio of rounds with scrapes to rounds without, and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f}-{self.high:.4f})"


@asynccontextmanager
async def serving(model: Path, flags: Sequence[str]) -> AsyncIterator[httpx.AsyncClient]:
    """Run a server, and yield a client for it."""
    command = [sys.executable, "-m", "server", str(model), "--port", "0", "--log-level", "ERROR", *flags]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_SECONDS):
            while (found := re.search(rb"page\s+(http\S+)/", line := await process.stdout.readline())) is None:
                if not line:
                    raise RuntimeError("the server ended before it was ready")
        async with httpx.AsyncClient(base_url=found[1].decode(), timeout=None) as client:
            yield client
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def read(client: httpx.AsyncClient) -> Reading:
    text = (await client.get("/metrics")).text
    tokens = re.findall(r"^ladimo_generation_tokens_total\{.*\} (\S+)$", text, re.M)
    cpu = re.findall(r"^process_cpu_seconds_total (\S+)$", text, re.M)
    return Reading(time.perf_counter(), sum(map(float, tokens)), float(cpu[0]))


async def load(client: httpx.AsyncClient, policy: str, tokens: int) -> None:
    """One client, which sends request after request until it is cancelled."""
    body = {"prompt": "def read_lines(path):\n", "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "routing": policy}
    while True:
        (await client.post("/v1/completions", json=body)).raise_for_status()


async def scrape(client: httpx.AsyncClient, every: float) -> None:
    """Scrape /metrics every `every` seconds, until cancelled."""
    due = time.perf_counter() + every / 2
    while True:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        (await client.get("/metrics")).raise_for_status()
        due += every


async def one_round(client: httpx.AsyncClient, arm: str, seconds: float, every: float) -> Round:
    begin = await read(client)
    scraper = asyncio.create_task(scrape(client, every)) if arm == "scraped" else None
    await asyncio.sleep(seconds)
    if scraper is not None:
        scraper.cancel()
        with suppress(asyncio.CancelledError):
            await scraper
    end = await read(client)
    return Round(end.at - begin.at, end.tokens - begin.tokens, 1000 * (end.cpu - begin.cpu))


def throughput(rounds: Sequence[Round]) -> float:
    """Tokens per second."""
    return sum(one.tokens for one in rounds) / sum(one.seconds for one in rounds)


def cpu_per_token(rounds: Sequence[Round]) -> float:
    """The server's CPU time per token, in milliseconds."""
    return sum(one.cpu_milliseconds for one in rounds) / sum(one.tokens for one in rounds)


def estimate(figure: Callable[[Sequence[Round]], float], pairs: Sequence[tuple[Round, Round]], draws: int = 2000) -> Estimate:
    """The figure of the second rounds divided by that of the first, with a percentile bootstrap over pairs (Efron, 1979)."""

    def ratio(chosen: Sequence[tuple[Round, Round]]) -> float:
        quiet, scraped = zip(*chosen, strict=True)
        return figure(scraped) / figure(quiet)

    generator = random.Random(0)
    drawn = sorted(ratio(generator.choices(pairs, k=len(pairs))) for _ in range(draws))
    return Estimate(ratio(pairs), drawn[draws // 40], drawn[-draws // 40 - 1])


async def scrape_milliseconds(client: httpx.AsyncClient, count: int) -> float:
    """CPU time of one scrape, in milliseconds, HTTP included, while the server does nothing else."""
    begin = await read(client)
    for _ in range(count - 1):
        await client.get("/metrics")
    end = await read(client)
    return 1000 * (end.cpu - begin.cpu) / count


async def measure(args: argparse.Namespace) -> dict[str, object]:
    policies = list(read_policies(args.model, read_config(args.model)))
    samples: dict[str, list[Round]] = {arm: [] for arm in ARMS}
    async with serving(args.model, args.flag) as client:
        clients = [asyncio.create_task(load(client, policies[n % len(policies)], args.tokens)) for n in range(args.clients)]
        try:
            await one_round(client, ARMS[0], args.seconds, args.every)  # warm-up
            other, started = OtherLoad(), time.perf_counter()
            for number in range(args.rounds):
                for arm in ARMS if number % 2 == 0 else reversed(ARMS):
                    samples[arm].append(await one_round(client, arm, args.seconds, args.every))
            busy = other.cores(time.perf_counter() - started)
        finally:
            for task in clients:
                task.cancel()
            ended = await asyncio.gather(*clients, return_exceptions=True)
        for failure in ended:
            if isinstance(failure, Exception):
                raise failure
        page = (await client.get("/metrics")).text
        cost = await scrape_milliseconds(client, 200)
    for arm, rounds in samples.items():
        speeds = sorted(one.tokens_per_second for one in rounds)
        print(f"{arm:<8} {throughput(rounds):8.1f} tokens/s ({speeds[0]:.1f}-{speeds[-1]:.1f}), ", end="")
        print(f"{cpu_per_token(rounds):.3f} CPU ms per token")
    pairs = list(zip(samples["quiet"], samples["scraped"], strict=True))
    speed, cpu = estimate(throughput, pairs), estimate(cpu_per_token, pairs)
    print(f"scraped / quiet: throughput {speed}, CPU per token {cpu}")
    print(f"a scrape of {page.count(chr(10))} lines: {cost:.2f} CPU ms; all other processes kept {busy:.2f} cores busy")
    return {
        "benchmark": "scrape_bench",
        "model": str(args.model),
        "clients": args.clients,
        "seconds": args.seconds,
        "rounds": args.rounds,
        "scrape_every_seconds": args.every,
        "throughput_ratio": asdict(speed),
        "cpu_per_token_ratio": asdict(cpu),
        "tokens_per_second": {arm: [round(one.tokens_per_second, 1) for one in rounds] for arm, rounds in samples.items()},
        "scrape_cpu_milliseconds": cost,
        "metrics_lines": page.count("\n"),
        "client_and_other_load_cores": busy,
        **conditions(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a converted checkpoint")
    parser.add_argument("--clients", type=int, default=4, help="clients; they take the policies in turn")
    parser.add_argument("--tokens", type=int, default=100, help="tokens per request")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=150, help="rounds with scrapes, and as many without")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between scrapes")
    parser.add_argument("--flag", action="append", default=[], help="a flag of the server, such as --flag=--device=cpu")
    print(json.dumps(asyncio.run(measure(parser.parse_args(argv)))))


if __name__ == "__main__":
    main()
