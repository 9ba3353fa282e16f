"""A whole server over the fake runner, for HTTP tests. Tokens are bytes, and each new byte is the last one plus one.

So a completion of "a" is "bcd...". `serving` calls the ASGI application directly, without a socket. `serving_http` runs uvicorn
on a free port, for tests of streams and of clients that disconnect.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from ladimo.model.config import ModelConfig
from ladimo.policy import Frontier, FrontierPoint, RoutingPolicy
from server.api.admission import Admission
from server.api.automatic_control import AutomaticControl
from server.api.http.http_protocol import HEADER_SECONDS, SEND_SECONDS, bounded_http
from server.api.requests.terms import FairQueueing
from server.api.services import SCRAPE_SECONDS, Services
from server.api.shadow import ShadowQuality
from server.api.waiting import WaitingRequests
from server.app import Access, create_app
from server.engine.async_engine import AsyncEngine, EngineState
from server.engine.batch import Batch, samples
from server.engine.core import EngineCore
from server.engine.messages import Rebound, StepStats
from server.engine.model_runner import BatchOutput, Drawn
from server.engine.request import GenerationRequest
from server.metrics import Metrics
from server.policies.controller import Control
from server.policies.load_meter import LoadMeter
from server.policies.store import PolicyStore
from server.policies.targets import Target
from server.policies.tiers import Tier
from server.telemetry import Telemetry
from server.text.language import Language
from server.text.tokenizer import Tokenizer
from server.text.tool_dialects import PLAIN_JSON, ToolDialect
from tests.factories import CHAT_TEMPLATE, EOS_ID, make_tokenizer, save_tokenizer
from tests.server.fakes import FAKE_CONFIG, FakeRunner, fake_core, fake_policy

CONFIG = replace(FAKE_CONFIG, vocab_size=258)
CONTEXT = 64
MODEL = "tiny"
TOP_K = {"fast": 1, "balanced": 2, "quality": 3, "full": 4}
ADMIN = {"Authorization": "Bearer admin-key"}


def policies() -> dict[str, RoutingPolicy]:
    return {name: fake_policy(name, top_k) for name, top_k in TOP_K.items()}


def frontier(config: ModelConfig = CONFIG) -> Frontier:
    points = []
    for name, top_k in TOP_K.items():
        experts = (float(top_k), None, float(top_k))
        points.append(FrontierPoint(1, name, config.active_parameters_ratio(experts), 20.0 - top_k, 2.0 - top_k / 10, experts))
    return Frontier(tuple(points))


def make_store(
    default: Target | None = None, directory: Path | None = None, tiers: Mapping[str, Tier] | None = None
) -> PolicyStore:
    return PolicyStore(CONFIG, policies(), frontier(), default, directory, tiers=tiers)


@dataclass
class Server:
    client: httpx.AsyncClient
    app: FastAPI
    services: Services
    runner: FakeRunner
    died: list[BaseException]
    releases: list[threading.Event] = field(default_factory=list)
    connections: Callable[[], int] = lambda: 0

    async def complete(self, prompt: Any = "a", **fields: Any) -> dict[str, Any]:
        reply = await self.client.post("/v1/completions", json={"prompt": prompt, **fields})
        assert reply.status_code == 200, reply.text
        body: dict[str, Any] = reply.json()
        return body

    async def metrics(self) -> dict[str, float]:
        """The samples of /metrics. Keys are names with labels, as they are written on the page."""
        return sample_values((await self.client.get("/metrics")).content)

    async def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)

    async def until_async(self, condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(60):
            while not await condition():
                await asyncio.sleep(0.005)

    async def submitted(self, sequences: int) -> None:
        """Wait until the engine has so many sequences that have not ended."""
        await self.until(lambda: len(self.services.engine._streams) == sequences)

    def hold_after(self, steps: int) -> threading.Event:
        """Let the engine run `steps` more steps. The next step then waits until the returned event is set."""
        execute, left, release = self.runner.execute, steps, threading.Event()
        self.releases.append(release)

        def held(batch: Batch) -> BatchOutput:
            nonlocal left
            if left == 0:
                release.wait()
            left = max(left - 1, 0)
            return execute(batch)

        self.runner.execute = held  # type: ignore[method-assign]
        return release

    def step_by_step(self) -> "Steps":
        """From now on every step waits for `Steps.go`."""
        execute, steps = self.runner.execute, Steps(self)

        def held(batch: Batch) -> BatchOutput:
            steps.waiting.set()
            steps.turn.acquire()
            return execute(batch)

        self.runner.execute = held  # type: ignore[method-assign]
        return steps

    def watch_requests(self) -> dict[str, GenerationRequest]:
        """The requests that reach the engine from now on, by request id. The dictionary is filled as they come."""
        execute, seen = self.runner.execute, dict[str, GenerationRequest]()

        def watched(batch: Batch) -> BatchOutput:
            seen.update({sequence.request.request_id: sequence.request for sequence, _ in batch.scheduled})
            return execute(batch)

        self.runner.execute = watched  # type: ignore[method-assign]
        return seen

    def say(self, *texts: str) -> None:
        """From now on each new sequence is answered with the next of these texts. The last text is then repeated."""
        left, tokens = list(texts), dict[str, Iterator[int]]()
        tokenizer = make_tokenizer()

        def scripted(batch: Batch) -> BatchOutput:
            output = FakeRunner.execute(self.runner, batch)
            drawing = [sequence for sequence, count in batch.scheduled if samples(sequence, count)]
            for place, sequence in enumerate(drawing):
                key = sequence.request.request_id
                if key not in tokens:
                    text = left.pop(0) if len(left) > 1 else left[0]
                    tokens[key] = iter([*tokenizer.encode(text, add_special_tokens=False), EOS_ID])
                output.drawn[place] = Drawn(next(tokens[key]), output.drawn[place].logprobs)
            return output

        self.runner.execute = scripted  # type: ignore[method-assign]

    def release(self) -> None:
        """Let all waiting steps run, so that the engine can stop."""
        for event in (self.runner.gate, *self.releases):
            event.set()

    async def idle(self) -> None:
        """Wait until no request runs, and the engine has handled all its commands."""
        await self.until(lambda: self.services.admission.in_flight == 0)
        await self.services.engine.read_experts()


class Steps:
    """Controls the engine's steps, one at a time."""

    def __init__(self, server: Server) -> None:
        self.waiting, self.turn = threading.Event(), threading.Semaphore(0)
        self._server = server

    async def begun(self) -> None:
        """Wait until a step has begun."""
        await self._server.until(self.waiting.is_set)

    def go(self) -> None:
        """Let the waiting step run."""
        self.waiting.clear()
        self.turn.release()


@dataclass
class Parts:
    """The options of a test server, with their defaults."""

    access: Access = Access(admin_key="admin-key")
    max_queue: int = 8
    max_queue_tokens: int | None = None
    request_timeout: float | None = None
    strict_fields: bool = False
    fair_queueing: FairQueueing = "key"
    stall_timeout: float = 120.0
    tool_dialect: ToolDialect = PLAIN_JSON
    comment_seconds: float = 10.0
    scrape_seconds: float = SCRAPE_SECONDS
    control: Control = Control()
    clock: Callable[[], float] = time.monotonic
    chat_template: str = CHAT_TEMPLATE
    keep_alive_timeout: float = 120.0
    header_timeout: float = HEADER_SECONDS
    send_timeout: float = SEND_SECONDS
    default: Target | None = None
    directory: Path | None = None
    tiers: Mapping[str, Tier] | None = None
    build: Callable[[EngineCore], EngineCore] = lambda core: core
    wait_ready: bool = True
    telemetry: Telemetry | None = None


@asynccontextmanager
async def make_server(
    tmp_path: Path, parts: Parts, **core: Any
) -> AsyncIterator[tuple[FastAPI, Services, FakeRunner, list[BaseException]]]:
    save_tokenizer(tmp_path / "tokenizer", parts.chat_template)
    sizes: dict[str, Any] = {"config": CONFIG, "max_model_len": CONTEXT, "clock": parts.clock, **core}
    built, runner = fake_core(**sizes)
    num_experts = {index: layer.num_experts for index, layer in enumerate(CONFIG.layers) if layer is not None}
    metrics = Metrics(CollectorRegistry(), num_experts, CONFIG.active_parameters_ratio)
    store = make_store(parts.default, parts.directory, parts.tiers)
    meter = LoadMeter(store.price)

    def on_step(stats: StepStats) -> None:
        metrics.record(stats)
        meter.observe(stats, parts.clock())

    def on_reject(code: str) -> None:
        metrics.admission_rejections.labels(code).inc()

    def on_rebound(reply: Rebound) -> None:
        waiting.rebound(reply)

    engine = AsyncEngine(lambda: parts.build(built), on_step, parts.clock, on_rebound=on_rebound)
    waiting = WaitingRequests(store, engine.rebind)
    admission = Admission(engine, parts.max_queue, on_reject, meter, parts.max_queue_tokens, parts.clock)
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    services = Services(
        engine=engine,
        admission=admission,
        store=store,
        language=Language(tokenizer, parts.tool_dialect, tokenizer.grammar_compiler(CONFIG.vocab_size)),
        metrics=metrics,
        automatic_control=AutomaticControl(store, metrics, meter, admission, waiting, parts.control, parts.clock),
        waiting=waiting,
        shadow=ShadowQuality(engine, store, metrics, share=0.0),
        config=CONFIG,
        model_name=MODEL,
        request_timeout=parts.request_timeout,
        strict_fields=parts.strict_fields,
        fair_queueing=parts.fair_queueing,
        telemetry=parts.telemetry,
        stall_timeout=parts.stall_timeout,
        comment_seconds=parts.comment_seconds,
        scrape_seconds=parts.scrape_seconds,
    )
    died: list[BaseException] = []
    app = create_app(services, parts.access, on_dead=died.append)
    yield app, services, runner, died


@asynccontextmanager
async def serving(tmp_path: Path, parts: Parts | None = None, **core: Any) -> AsyncIterator[Server]:
    """A server behind httpx's ASGI transport. Clients get a stream only when it is complete."""
    parts = parts or Parts()
    async with (
        make_server(tmp_path, parts, **core) as (app, services, runner, died),
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
    ):
        server = Server(client, app, services, runner, died)
        if parts.wait_ready:
            await server.until(lambda: services.engine.state is not EngineState.LOADING)
        try:
            yield server
        finally:
            server.release()


@asynccontextmanager
async def serving_http(tmp_path: Path, parts: Parts | None = None, **core: Any) -> AsyncIterator[Server]:
    """A server on a socket. Its send buffer is small, so a client that does not read soon stops the server from sending."""
    parts = parts or Parts()
    async with make_server(tmp_path, parts, **core) as (app, services, runner, died):
        http = bounded_http(parts.header_timeout, parts.send_timeout)
        uvicorn_server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=http,
                timeout_keep_alive=parts.keep_alive_timeout,  # type: ignore[arg-type]
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=5,
            )
        )
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        port = listener.getsockname()[1]
        task = asyncio.create_task(uvicorn_server.serve([listener]))
        while not uvicorn_server.started or services.engine.state is EngineState.LOADING:
            await asyncio.sleep(0.005)
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60)
        server = Server(client, app, services, runner, died)
        server.connections = lambda: len(uvicorn_server.server_state.connections)
        try:
            async with client:
                yield server
        finally:
            server.release()
            uvicorn_server.should_exit = True
            await task


def sample_values(page: bytes) -> dict[str, float]:
    """The samples of a metrics page. Keys are names with labels, as they are written on the page."""
    pairs = (line.rsplit(" ", 1) for line in page.decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def events(text: str) -> list[dict[str, Any]]:
    """The events of a complete stream, as JSON. Asserts that the stream ends with [DONE]."""
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
