"""The asyncio side of the engine, and the thread that the engine runs on.

Each request has a stream of events. Commands with a reply are awaited. `wait_dead` tells when the engine has ended. The engine
thread waits for its mailbox when it is idle. It hands all results of one step to the event loop in one call.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from itertools import count

from ladimo.policy import RoutingPolicy
from server.engine.config import EngineLimits
from server.engine.core import EngineCore
from server.engine.messages import (
    Abort,
    Activate,
    Activated,
    Command,
    EngineDead,
    ExpertSnapshot,
    ReadExperts,
    Rebind,
    Rebinding,
    Rebound,
    Replay,
    Replayed,
    Report,
    StepResult,
    StepStats,
    Stop,
    Submit,
    TokenEvent,
)
from server.engine.request import FinishReason, GenerationRequest

IDLE_HEARTBEAT_SECONDS = 0.5
STOP_SECONDS = 3.0
QUIET_SECONDS = 0.25

logger = logging.getLogger(__name__)


class EngineState(StrEnum):
    """LOADING until `start` returns, then READY, and DEAD after an error or `stop`."""

    LOADING = "loading"
    READY = "ready"
    DEAD = "dead"


class AsyncEngine:
    """The engine for one event loop. Only `heartbeat` and its age may be read from elsewhere.

    `build_core` runs on the engine thread. `on_step` runs on the event loop after every step, `on_replayed` after every replay,
    `on_rebound` for every reply to `rebind`.
    `heartbeat` is when the engine loop last turned, in seconds of `clock`. `quiet_seconds`: the engine must have been idle so
    long before it begins with replays.
    """

    def __init__(
        self,
        build_core: Callable[[], EngineCore],
        on_step: Callable[[StepStats], None],
        clock: Callable[[], float] = time.monotonic,
        on_replayed: Callable[[Replayed], None] = lambda _: None,
        on_rebound: Callable[[Rebound], None] = lambda _: None,
        quiet_seconds: float = QUIET_SECONDS,
    ) -> None:
        self.state = EngineState.LOADING
        self._clock = clock
        self.heartbeat = clock()
        self._build_core, self._on_step, self._on_replayed, self._on_rebound = build_core, on_step, on_replayed, on_rebound
        self._quiet_seconds = quiet_seconds
        self._mailbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[TokenEvent]] = {}
        self._calls: dict[int, asyncio.Future[Activated | ExpertSnapshot]] = {}
        self._call_ids = count()
        self._limits: EngineLimits | None = None
        self._dead = asyncio.Event()
        self._cause: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine loop's last turn."""
        return self._clock() - self.heartbeat

    @property
    def limits(self) -> EngineLimits:
        """The limits of the engine. Must not be read before it is ready."""
        assert self._limits is not None, "known once the engine is ready"
        return self._limits

    async def start(self) -> None:
        """Build the core on the engine thread and return when it is ready. Raises whatever `build_core` raised."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[EngineLimits] = loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(loop, ready), name="engine", daemon=True)
        self._thread.start()
        try:
            self._limits = await asyncio.shield(ready)
        except BaseException as error:
            self._mailbox.put(Stop())  # the thread may get ready later, when nobody waits for it any more
            self._die(error)
            raise
        self.state = EngineState.READY

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yield the request's events as they come. Closing the generator early aborts the request.

        Raises EngineDead when the engine is not ready, and when it dies before the request ends.
        """
        self._check_alive()
        assert request.request_id not in self._streams
        stream: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._streams[request.request_id] = stream
        self._mailbox.put(Submit(request))
        over = False
        try:
            while not over:
                event = await stream.get()
                over = event.finished is not None or event.error is not None
                if event.error is not None:
                    raise event.error
                yield event
        finally:
            # If `finish` has removed the stream already, there is nothing left to abort.
            if self._streams.pop(request.request_id, None) is not None and not over:
                self._mailbox.put(Abort(request.request_id))

    def finish(self, request_id: str) -> None:
        """End a request because its text contains a stop string. It counts as stopped, not as aborted."""
        if self._streams.pop(request_id, None) is not None:
            self._mailbox.put(Abort(request_id, FinishReason.STOP))

    async def activate(self, policies: Sequence[RoutingPolicy]) -> None:
        """Keep exactly these policies resident, besides the policies of running requests.

        Raises PolicyTableFull when there are too few rows, EngineDead when the engine is not ready or dies.
        """
        reply = await self._call(lambda call_id: Activate(call_id, tuple(policies)))
        assert isinstance(reply, Activated)
        if reply.error is not None:
            raise reply.error

    async def read_experts(self) -> ExpertSnapshot:
        """The expert counters, read between two steps and therefore exact. Raises EngineDead."""
        reply = await self._call(ReadExperts)
        assert isinstance(reply, ExpertSnapshot)
        return reply

    def rebind(self, changes: Sequence[Rebinding]) -> None:
        """Give requests that have not begun other policies. `on_rebound` learns which changes were made, before any event of
        these requests."""
        self._mailbox.put(Rebind(tuple(changes)))

    def replay(self, answer: Replay) -> None:
        """Compare policies on a finished answer when there is nothing else to do. `on_replayed` gets the result."""
        self._mailbox.put(answer)

    async def wait_dead(self) -> BaseException | None:
        """Wait until the engine has ended. Returns the exception that killed it, or None after `stop`."""
        await self._dead.wait()
        return self._cause

    async def stop(self, timeout_seconds: float = STOP_SECONDS) -> None:
        """End the loop after the current step. Running requests get EngineDead.

        If the step does not end within `timeout_seconds`, its thread is left behind.
        """
        if self._thread is None or self._dead.is_set():
            return
        self._mailbox.put(Stop())
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._dead.wait()
        except TimeoutError:
            logger.warning("the engine's step did not end within %g s and is abandoned", timeout_seconds)
            self._die(None)
        else:
            self._thread.join()

    async def _call(self, command: Callable[[int], Command]) -> Activated | ExpertSnapshot:
        self._check_alive()
        call_id = next(self._call_ids)
        future: asyncio.Future[Activated | ExpertSnapshot] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self._mailbox.put(command(call_id))
            return await future
        finally:
            del self._calls[call_id]

    def _check_alive(self) -> None:
        if self.state is not EngineState.READY:
            raise EngineDead(f"the engine is {self.state}")

    def _deliver(self, reports: list[Report]) -> None:
        for report in reports:
            match report:
                case StepResult(events, stats):
                    for event in events:
                        self._put(event)
                    self._on_step(stats)
                case TokenEvent():
                    self._put(report)
                case Rebound():
                    self._on_rebound(report)
                case Replayed():
                    self._on_replayed(report)
                case Activated(call_id) | ExpertSnapshot(call_id):
                    future = self._calls.get(call_id)
                    if future is not None and not future.done():
                        future.set_result(report)

    def _put(self, event: TokenEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is not None:  # None: the request was aborted while the event was under way
            stream.put_nowait(event)

    def _die(self, cause: BaseException | None) -> None:
        if self._dead.is_set():
            return
        self.state, self._cause = EngineState.DEAD, cause
        dead = EngineDead("the engine has stopped" if cause is None else f"a step failed: {type(cause).__name__}")
        for request_id, stream in self._streams.items():
            stream.put_nowait(TokenEvent(request_id, None, error=dead))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(dead)
        self._dead.set()

    def _run(self, loop: asyncio.AbstractEventLoop, ready: "asyncio.Future[EngineLimits]") -> None:
        """The engine thread."""
        try:
            core = self._build_core()
        except BaseException as error:
            _tell(loop, ready.set_exception, error)
            return
        _tell(loop, ready.set_result, core.limits)
        cause: BaseException | None = None
        quiet = 0.0  # seconds without a command before spare work may begin
        try:
            while (commands := self._receive(0.0 if core.has_work else quiet if core.has_spare_work else math.inf)) is not None:
                reports = [report for command in commands if (report := core.handle(command)) is not None]
                if core.has_work:
                    reports.append(core.step())
                    quiet = self._quiet_seconds
                elif core.has_spare_work and not commands:
                    quiet = 0.0
                    if (replayed := core.spare_step()) is not None:
                        reports.append(replayed)
                if reports:
                    _tell(loop, self._deliver, reports)
        except BaseException as error:
            cause = error
        _tell(loop, self._die, cause)

    def _receive(self, patience: float) -> list[Command] | None:
        """Take all commands out of the mailbox; None after Stop. Waits `patience` seconds for the first command."""
        commands: list[Command] = []
        while True:
            self.heartbeat = self._clock()
            wait = 0.0 if commands else min(patience, IDLE_HEARTBEAT_SECONDS)
            try:
                command = self._mailbox.get(block=wait > 0, timeout=wait)
            except queue.Empty:
                patience -= wait
                if commands or patience <= 0:
                    return commands
                continue
            if isinstance(command, Stop):
                return None
            commands.append(command)


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: object) -> None:
    """Call `callback` on the event loop. After the loop was closed nobody listens any more, so the call is dropped."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *arguments)
