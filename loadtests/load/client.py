"""Sends planned requests when they are due, and records what comes back."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from loadtests.load.workload import Planned

KNOB_SECONDS = 0.5


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are in seconds since the start of the test.

    `due`: when it should have been sent; latencies count from here. `gaps`: between two chunks of the answer. `status` 0: the
    connection failed. `code`: the code of an error.
    """

    routing: str
    due: float
    sent: float = 0.0
    first: float | None = None
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    status: int = 0
    code: str | None = None
    cancelled: bool = False
    policy: str | None = None
    accuracy: float | None = None
    reason: str | None = None
    bytes_ratio: float | None = None

    @property
    def completed(self) -> bool:
        return self.status == 200 and self.code is None and not self.cancelled

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.due

    @property
    def tpot(self) -> float | None:
        """The time per output token after the first."""
        if self.first is None or self.output_tokens < 2:
            return None
        return (self.ended - self.first) / (self.output_tokens - 1)

    @property
    def e2el(self) -> float:
        return self.ended - self.due


@dataclass(frozen=True, slots=True)
class Knob:
    """What the server says about its default at one time."""

    at: float
    accuracy: float | None
    policy: str


class Client:
    """Sends requests to an OpenAI-style server. `deadline`: seconds, sent as X-Request-Timeout; None: none. `seeded`: whether
    requests have a seed."""

    def __init__(self, http: httpx.AsyncClient, deadline: float | None = None, seeded: bool = True) -> None:
        self._http = http
        self._seeded = seeded
        self._headers = {} if deadline is None else {"X-Request-Timeout": f"{deadline:g}"}
        self._start = 0.0

    async def run(self, planned: Sequence[Planned]) -> tuple[list[Outcome], list[Knob]]:
        """All outcomes, in order, and the knob over time. Returns when the last answer has ended."""
        self._start = time.perf_counter()
        knobs: list[Knob] = []
        watch = asyncio.create_task(self._watch(knobs))
        tasks = []
        try:
            for request in planned:
                await asyncio.sleep(max(0.0, request.at - self._now()))
                tasks.append(asyncio.create_task(self._one(request)))
            outcomes = await asyncio.gather(*tasks)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        return outcomes, knobs

    async def run_closed(self, planned: Sequence[Planned], clients: int) -> list[Outcome]:
        """Keep so many clients busy until all requests are done. A request is due when its client is free."""
        self._start = time.perf_counter()
        outcomes: list[Outcome] = []
        waiting = iter(planned)

        async def client() -> None:
            while (request := next(waiting, None)) is not None:
                outcomes.append(await self._one(replace(request, at=self._now())))

        await asyncio.gather(*(client() for _ in range(clients)))
        return outcomes

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _one(self, request: Planned) -> Outcome:
        outcome = Outcome(request.routing.name, request.at, self._now())
        body: dict[str, Any] = {
            "prompt": request.prompt,
            "max_tokens": request.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._seeded:
            body["seed"] = request.seed
        if request.routing.field is not None:
            body["routing"] = request.routing.field
        try:
            async with self._http.stream("POST", "/v1/completions", json=body, headers=self._headers) as reply:
                outcome.status = reply.status_code
                if reply.status_code == 200:
                    await self._read(reply, request, outcome)
                else:
                    error = json.loads(await reply.aread()).get("error", {})
                    outcome.code = str(error.get("code", "unknown"))  # a number in vLLM
        except (httpx.HTTPError, ValueError) as error:
            outcome.code = type(error).__name__
        outcome.ended = self._now()
        return outcome

    async def _read(self, reply: httpx.Response, request: Planned, outcome: Outcome) -> None:
        last, chunks, rest = 0.0, 0, b""
        async for piece in reply.aiter_raw():
            now = self._now()
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                if not event.startswith(b"data: {"):
                    continue
                if b'"usage":{' in event or b'"error"' in event or b'"routing":{' in event:
                    self._note(json.loads(event[6:]), outcome)
                if b'"choices":[]' in event or b'"error"' in event or (b'"usage":{' in event and b'"text":""' in event):
                    continue  # llama.cpp's last chunk has the usage and no token
                chunks += 1
                if outcome.first is None:
                    outcome.first = now
                else:
                    outcome.gaps.append(now - last)
                last = now
            if request.cancel_after is not None and chunks >= request.cancel_after:
                outcome.cancelled, outcome.output_tokens = True, chunks
                return

    def _note(self, event: dict[str, Any], outcome: Outcome) -> None:
        if "error" in event:
            outcome.code = str(event["error"].get("code", "unknown"))
        usage, routing = event.get("usage"), event.get("routing")
        if usage:
            outcome.prompt_tokens, outcome.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        if routing:
            outcome.policy, outcome.accuracy, outcome.reason = routing["policy"], routing["accuracy"], routing["reason"]
            outcome.bytes_ratio = routing.get("bytes_ratio", routing["active_parameters_ratio"])

    async def _watch(self, knobs: list[Knob]) -> None:
        """Servers without /v1/routing have no knob to watch."""
        while True:
            reply = await self._http.get("/v1/routing")
            if reply.status_code != 200:
                return
            default = reply.json()["default"]
            knobs.append(Knob(self._now(), default["accuracy"], default["policy"]))
            await asyncio.sleep(KNOB_SECONDS)
