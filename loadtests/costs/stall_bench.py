"""How long the request body of one client can hold up the stream of another client.

    python -m loadtests.costs.stall_bench MODEL [--mebibytes 7.7] [--rounds 3]

The server runs in its own process. One client streams all the time. Another client sends each of the worst bodies in turn. The
figure is the longest time between two events of an answer while the body is read and answered. In the row "quiet" no body is
sent.
"""

import argparse
import asyncio
import gzip
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx

from ladimo.checkpoint import read_config
from loadtests.common.conditions import OtherLoad, conditions
from loadtests.costs.scrape_bench import serving

QUIET = "quiet"
QUIET_SECONDS = 2.0
# Runs a server of a checkpoint with flags, and yields a client for it.
Serve = Callable[[Path, Sequence[str]], AbstractAsyncContextManager[httpx.AsyncClient]]


def worst_bodies(size: int, context: int) -> dict[str, bytes]:
    """Bodies of about `size` bytes for /v1/completions. The last three are valid requests. `context` is in tokens."""

    def many(item: str, count: int | None = None) -> str:
        return ",".join([item] * (count or size // (len(item) + 1)))

    def completion(fields: str) -> bytes:
        return b'{"max_tokens":1,%s}' % fields.encode()

    names = ",".join(f'"{number}":1' for number in range(size // 12))
    prompt = many("5", context - 1)
    prompts = f"[{prompt}]," * min(64, size // (2 * context))
    return {
        "objects in an unknown field": completion(f'"prompt":"a","x":[{many("{}")}]'),
        "lists in an unknown field": completion(f'"prompt":"a","x":[{many("[]")}]'),
        "a bias for every number": completion(f'"prompt":"a","logit_bias":{{{names}}}'),
        "nested as deep as it goes": completion(f'"prompt":{"[" * size}'),
        "one prompt of ids": completion(f'"prompt":[{many("5")}]'),
        "one prompt of wrong ids": completion(f'"prompt":[[{many("-5")}]]'),
        "many wrong messages": completion(f'"prompt":"a","messages":[{many("{}")}]'),
        "a string of escapes": completion('"prompt":"%s"' % ("\\n" * (size // 2))),
        "a gzip bomb": gzip.compress(completion(f'"prompt":"{"a" * (20 * size)}"')),
        "numbers in an unknown field": completion(f'"prompt":"a","x":[{many("5")}]'),
        "a long unknown field": completion(f'"prompt":"a","x":"{"a" * size}"'),
        "prompts of ids that fit": completion(f'"prompt":[{prompts[:-1]}]'),
    }


@dataclass
class Stream:
    """A client that streams without end. It measures the longest time between two events of an answer since `restart`.

    The time until the first event of an answer does not count, because the request may wait in the queue.
    """

    client: httpx.AsyncClient
    tokens: int
    longest: float = 0.0
    _last: float | None = None

    def restart(self) -> None:
        self.longest = 0.0
        self._last = None if self._last is None else time.perf_counter()

    def stop(self) -> float:
        """The longest wait in seconds, including one that is not over yet."""
        return self.longest if self._last is None else max(self.longest, time.perf_counter() - self._last)

    async def run(self) -> None:
        """Stream until cancelled."""
        body = {"prompt": "a", "max_tokens": self.tokens, "ignore_eos": True, "stream": True}
        while True:
            async with self.client.stream("POST", "/v1/completions", json=body) as reply:
                reply.raise_for_status()
                self._last = None
                async for _ in reply.aiter_raw():
                    now = time.perf_counter()
                    self.longest = max(self.longest, 0.0 if self._last is None else now - self._last)
                    self._last = now


async def send(url: httpx.URL, body: bytes) -> int:
    """Send a body and return the status of the answer. Runs on a thread, because 8 MiB would hold up the streaming client."""
    headers = {"Content-Type": "application/json", **({"Content-Encoding": "gzip"} if body.startswith(b"\x1f\x8b") else {})}
    reply = await asyncio.to_thread(
        httpx.post, url.join("/v1/completions"), content=body, headers=headers, timeout=None, trust_env=False
    )
    return reply.status_code


async def measure(args: argparse.Namespace, serve: Serve) -> dict[str, object]:
    context = read_config(args.model).max_position_embeddings
    bodies = worst_bodies(int(args.mebibytes * 2**20), context)
    waits: dict[str, list[float]] = {name: [] for name in (QUIET, *bodies)}
    answers: dict[str, tuple[int, float]] = {}
    async with serve(args.model, args.flag) as client:
        stream = Stream(client, min(args.tokens, context - 8))
        streaming = asyncio.create_task(stream.run())
        await asyncio.sleep(1)  # warm-up
        other, started = OtherLoad(), time.perf_counter()
        for _ in range(args.rounds):
            stream.restart()
            await asyncio.sleep(args.quiet)
            waits[QUIET].append(stream.stop())
            for name, body in bodies.items():
                stream.restart()
                begin = time.perf_counter()
                status = await send(client.base_url, body)
                answers[name] = (status, time.perf_counter() - begin)
                waits[name].append(stream.stop())
        busy = other.cores(time.perf_counter() - started)
        assert not streaming.done(), streaming
        streaming.cancel()
        with suppress(asyncio.CancelledError):
            await streaming
    print(f"{'body':<30} {'bytes':>9} {'status':>6} {'answered':>9} {'longest wait':>13}  (median of {args.rounds}, worst)")
    for name, seconds in waits.items():
        status, answered = answers.get(name, (0, 0.0))
        size = len(bodies.get(name, b""))
        middle, worst = 1000 * median(seconds), 1000 * max(seconds)
        print(f"{name:<30} {size:>9} {status or '':>6} {answered:>8.2f}s {middle:>10.1f} ms  {worst:.1f} ms")
    print(f"this client and all other processes kept {busy:.2f} cores busy")
    return {
        "benchmark": "stall_bench",
        "model": str(args.model),
        "mebibytes": args.mebibytes,
        "longest_wait_milliseconds": {name: [round(1000 * one, 1) for one in seconds] for name, seconds in waits.items()},
        "statuses": {name: status for name, (status, _) in answers.items()},
        "client_and_other_load_cores": busy,
        **conditions(),
    }


def main(argv: Sequence[str] | None = None, serve: Serve = serving) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint")
    parser.add_argument("--mebibytes", type=float, default=7.7, help="size of a body; the server's own limit is 8")
    parser.add_argument("--rounds", type=int, default=3, help="how often each body is sent")
    parser.add_argument("--quiet", type=float, default=QUIET_SECONDS, help="seconds of a round without any body")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each streamed answer")
    parser.add_argument("--flag", action="append", default=[], help="a flag of the server, such as --flag=--device=cpu")
    print(json.dumps(asyncio.run(measure(parser.parse_args(argv), serve))))


if __name__ == "__main__":
    main()
