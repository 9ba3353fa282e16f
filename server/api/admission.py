"""Who may enter: a bounded number of sequences, and nobody while the engine loads, drains or is dead."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.engine.async_engine import AsyncEngine, EngineState
from server.errors import BadRequest, Dead, Draining, Loading, QueueFull, ServiceError

MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1, 120  # official clients give up at once when told to wait longer
LOADING_RETRY_SECONDS, DRAINING_RETRY_SECONDS, DEAD_RETRY_SECONDS = 2, 5, 30
RATE_WINDOW = 64


class Admission:
    """Permits for sequences: the engine's batch plus `max_queue` waiting ones. `on_reject` is told the code of each refusal."""

    def __init__(self, engine: AsyncEngine, max_queue: int, on_reject: Callable[[str], None]) -> None:
        self.in_flight = 0
        self.draining = False
        self._engine, self._max_queue, self._on_reject = engine, max_queue, on_reject
        self._idle = asyncio.Event()
        self._idle.set()
        self._ended: deque[float] = deque(maxlen=RATE_WINDOW)

    @property
    def capacity(self) -> int:
        return self._engine.limits.max_num_seqs + self._max_queue

    def unavailable(self) -> ServiceError | None:
        """Why no request is taken now; None when requests are."""
        if self._engine.state is EngineState.LOADING:
            return Loading("the model is still loading", retry_after=LOADING_RETRY_SECONDS)
        if self._engine.state is EngineState.DEAD:
            return Dead("the engine has stopped", retry_after=DEAD_RETRY_SECONDS)
        if self.draining:
            return Draining("the server is shutting down and takes no new requests", retry_after=DRAINING_RETRY_SECONDS)
        return None

    def check(self, sequences: int) -> None:
        """Raises Loading, Dead, Draining, QueueFull, or BadRequest when so many could never be admitted together."""
        error = self.unavailable()
        if error is None and sequences > self.capacity:
            raise BadRequest(f"prompt: at most {self.capacity} prompts fit this server at once", param="prompt")
        if error is None and self.in_flight + sequences > self.capacity:
            error = QueueFull("too many requests are waiting", retry_after=self._retry_after(sequences))
        if error is not None:
            self._on_reject(error.code)
            raise error

    @contextmanager
    def permit(self, sequences: int) -> Iterator[None]:
        """Hold places for as long as the block runs. Raises what `check` raises."""
        self.check(sequences)
        self.in_flight += sequences
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= sequences
            now = time.monotonic()
            self._ended.extend([now] * sequences)
            if self.in_flight == 0:
                self._idle.set()

    async def wait_idle(self) -> None:
        await self._idle.wait()

    def _retry_after(self, sequences: int) -> int:
        """Seconds until enough places will be free at the rate at which sequences have been ending."""
        needed = self.in_flight + sequences - self.capacity
        if not self._ended:
            return MIN_RETRY_SECONDS
        elapsed = time.monotonic() - self._ended[0]
        return min(max(math.ceil(needed * elapsed / len(self._ended)), MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
