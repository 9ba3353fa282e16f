"""Limits the sequences and the waiting prompt tokens in the server. Admits nothing while the engine loads, drains or is dead.

A refused client is told when to retry. The time follows from the work that waits and from what the engine's steps cost.
"""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import replace

from server.engine.async_engine import AsyncEngine, EngineState
from server.errors import BadRequest, Dead, Draining, Loading, QueueFull, ServiceError
from server.policies.load_meter import LoadMeter, Queue

MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1, 120  # OpenAI's clients give up at once if they are told to wait longer
LOADING_RETRY_SECONDS, DRAINING_RETRY_SECONDS, DEAD_RETRY_SECONDS = 2, 5, 30


class Permit:
    """One request's share of the limits: places for its sequences, and room for its prompt tokens while they wait.

    It holds nothing at first. The caller that makes a permit must close it.
    """

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission
        self._sequences = self._waiting_tokens = 0
        self._patient = 0  # sequences that wait and let others go before them

    def enter(self, sequences: int, param: str | None = None) -> None:
        """Take places, before any work is done. Raises the errors of `Admission.take_places`."""
        self._admission.take_places(sequences, param)
        self._sequences = sequences

    def wait(self, prompt_tokens: int, deadline: float | None = None) -> None:
        """Take room for the prompts, which are encoded and wait for the engine. Raises the errors of `Admission.take_room`."""
        self._admission.take_room(prompt_tokens, deadline)
        self._waiting_tokens = prompt_tokens
        if self._patient:
            self._admission.patient_tokens += prompt_tokens

    def let_pass(self) -> None:
        """The request lets requests of the usual priority go before it, so they do not wait for it."""
        self._patient = self._sequences
        self._admission.patient += self._patient

    @property
    def admission(self) -> "Admission":
        return self._admission

    def started(self, prompt_tokens: int) -> None:
        """Give back the room of a sequence that has its first token. Its prompt no longer waits."""
        self._waiting_tokens -= prompt_tokens
        self._admission.give_back(0, prompt_tokens)
        if self._patient:
            self._patient -= 1
            self._admission.patient -= 1
            self._admission.patient_tokens -= prompt_tokens

    def close(self) -> None:
        """Give everything back. A second call does nothing."""
        self._admission.give_back(self._sequences, self._waiting_tokens)
        if self._patient:
            self._admission.patient -= self._patient
            self._admission.patient_tokens -= self._waiting_tokens
        self._sequences = self._waiting_tokens = self._patient = 0


class Admission:
    """There are places for the engine's batch and for `max_queue` waiting sequences. `max_queue_tokens`: the most prompt tokens
    that may wait (None: no limit). If none wait, a request is admitted however long its prompt is. All tokens of a prompt count
    until its sequence has its first token. `on_reject` gets the error code of each refusal.
    `meter` knows how long what waits will take.

    A request takes its places before its text is encoded, and room for its prompt tokens as soon as they are known.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        max_queue: int,
        on_reject: Callable[[str], None],
        meter: LoadMeter,
        max_queue_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.in_flight = 0
        self.waiting_tokens = 0
        self.patient = self.patient_tokens = 0  # the part of both that lets others go first, and has no first token yet
        self.draining = False
        self.meter = meter
        self._engine, self._on_reject, self._clock = engine, on_reject, clock
        self._max_queue, self._max_queue_tokens = max_queue, max_queue_tokens
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def queue(self) -> Queue | None:
        """How full the server is; None until the engine is ready."""
        if self._engine.state is not EngineState.READY:
            return None
        return Queue(self.in_flight, self.waiting_tokens, self._engine.limits.max_num_seqs, self._max_queue)

    def least_wait_seconds(self, price: float) -> float | None:
        """How long the newest request of the usual priority waits at least, if all before it have this price, the lowest that
        they may get. None while too little is known."""
        queue = self.queue
        if queue is None:
            return None
        before = replace(
            queue, in_flight=queue.in_flight - self.patient, waiting_tokens=queue.waiting_tokens - self.patient_tokens
        )
        return self.meter.least_wait_seconds(before, price)

    @property
    def capacity(self) -> int:
        return self._engine.limits.max_num_seqs + self._max_queue

    def unavailable(self) -> ServiceError | None:
        """The error that every request gets now; None if requests are accepted."""
        if self._engine.state is EngineState.LOADING:
            return Loading("the model is still loading", retry_after=LOADING_RETRY_SECONDS)
        if self._engine.state is EngineState.DEAD:
            return Dead("the engine has stopped", retry_after=DEAD_RETRY_SECONDS)
        if self.draining:
            return Draining("the server is shutting down and takes no new requests", retry_after=DRAINING_RETRY_SECONDS)
        return None

    def take_places(self, sequences: int, param: str | None = None) -> None:
        """`param`: the field that sets the number of sequences.

        Raises Loading, Dead, Draining or QueueFull. Raises BadRequest if there are more sequences than places in all.
        """
        error = self.unavailable()
        self.meter.arrived(sequences, self._clock())
        if error is None and sequences > self.capacity:
            message = f"{sequences} choices (prompts times n) were asked for; at most {self.capacity} fit this server at once"
            raise BadRequest(message, param=param)
        self.refuse(error or self._no_places(sequences) or self._no_room())
        self.in_flight += sequences
        self._idle.clear()

    def take_room(self, prompt_tokens: int, deadline: float | None = None) -> None:
        """`deadline`: the event loop's time by which the answer must be complete.

        Raises QueueFull if too many prompt tokens would wait, or if those that wait already would take until the deadline.
        """
        self.refuse(self._no_room(prompt_tokens) or self._too_late(deadline))
        self.waiting_tokens += prompt_tokens

    def give_back(self, sequences: int, prompt_tokens: int) -> None:
        self.in_flight -= sequences
        self.waiting_tokens -= prompt_tokens
        if self.in_flight == 0:
            self._idle.set()

    def answer_seconds(self, price: float, token_limit: int | None) -> float:
        """How long the newest request needs until its end under a policy of this price. 0 while too little is known."""
        queue = self.queue
        return 0.0 if queue is None else self.meter.answer_seconds(queue, price, self._clock(), token_limit)

    async def wait_idle(self) -> None:
        await self._idle.wait()

    def refuse(self, error: ServiceError | None) -> None:
        """Count and raise the error, if there is one."""
        if error is not None:
            self._on_reject(error.code)
            raise error

    def _no_places(self, sequences: int) -> QueueFull | None:
        too_many = self.in_flight + sequences - self.capacity
        if too_many <= 0:
            return None
        seconds = self.meter.completion_seconds(too_many, self._engine.limits.max_num_seqs)
        return QueueFull("too many requests are waiting", retry_after=retry_after(seconds))

    def _no_room(self, prompt_tokens: int = 0) -> QueueFull | None:
        most = self._max_queue_tokens
        if most is None or not self.waiting_tokens or self.waiting_tokens + prompt_tokens <= most:
            return None
        queue = self.queue
        assert queue is not None
        share = (self.waiting_tokens + prompt_tokens - most) / self.waiting_tokens
        return QueueFull("too many prompt tokens are waiting", retry_after=retry_after(share * self.meter.wait_seconds(queue)))

    def _too_late(self, deadline: float | None) -> QueueFull | None:
        queue = self.queue
        if deadline is None or queue is None:
            return None
        wait = self.meter.wait_seconds(queue)
        if wait <= deadline - asyncio.get_running_loop().time():
            return None
        message = f"the requests that wait already are expected to take {wait:.1f} s, longer than the request's deadline allows"
        return QueueFull(message, retry_after=retry_after(wait))


def retry_after(seconds: float) -> int:
    """The value of the header: whole seconds, within bounds."""
    return min(max(math.ceil(seconds), MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
