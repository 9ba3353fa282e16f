"""A server in simulated time, for tests of automatic control: arrivals, a queue, a batch, steps that take time.

Requests keep the price that they began with. A step takes `fixed + weights * price + rows * row`, and a prompt is one step's
part. Neither the costs nor the controller know these numbers.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from server.engine.messages import RequestStats, StepStats
from server.engine.request import FinishReason
from server.policies.controller import Control, Controller, Decision
from server.policies.load_meter import LoadMeter, Queue
from server.policies.targets import Objective

PRICES = {"fast": 0.4, "balanced": 0.6, "quality": 0.8, "full": 1.0}


def policy_at(accuracy: float) -> str:
    """The frontier: four policies at equal distances."""
    return [*PRICES][int(accuracy * 3 + 1e-9)]


def price_at(accuracy: float) -> float:
    return PRICES[policy_at(accuracy)]


@dataclass
class Request:
    policy: str
    arrived: float
    left: int
    first: float | None = None
    last: float = 0.0


@dataclass
class Plant:
    """`price_share`: how much of a step's time goes with the price. `noise`: how much a step's time varies."""

    objective: Objective
    batch: int = 8
    places: int = 64
    output_tokens: int = 40
    prompt_tokens: int = 32
    step_seconds: float = 0.02
    price_share: float = 0.8
    noise: float = 0.0
    seed: int = 0
    named: float = 0.0  # the share of requests that name `full`
    now: float = 0.0
    decisions: list[Decision] = field(default_factory=list)
    served: list[tuple[float, str, float]] = field(
        default_factory=list
    )  # when it came, its policy, its time to the first token
    rejected: int = 0

    def __post_init__(self) -> None:
        self.meter = LoadMeter(PRICES.__getitem__)
        self.controller = Controller(self.now, Control(), price_at)
        self._random = random.Random(self.seed)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._ended: float | None = None
        self._next_decision = 0.0

    @property
    def capacity(self) -> float:
        """Requests per second at the price 1."""
        step, prompt = self.step_seconds, self.prompt_tokens * self.step_seconds / 200
        return 1 / (self.output_tokens * step / self.batch + prompt)

    def run(self, seconds: float, rate: Callable[[float], float] | float, poisson: bool = False) -> None:
        """`rate`: requests per second, by the time since the beginning."""
        end = self.now + seconds
        due = self.now + self._gap(rate, poisson)
        while self.now < end:
            while due <= self.now:
                self._arrive(due)
                due += self._gap(rate, poisson, due)
            if self.now >= self._next_decision:
                self._decide()
            if self._waiting or self._running:
                self._step()
            else:
                self.now = min(due, self._next_decision, end)

    def accuracies(self, since: float) -> list[float]:
        return [decision.accuracy for decision in self.decisions if decision.at >= since]

    def reversals(self, since: float) -> int:
        """How often the direction of change turned round."""
        turns = [decision.direction for decision in self.decisions if decision.at >= since and decision.direction != "hold"]
        return sum(one != other for one, other in zip(turns, turns[1:], strict=False))

    def _gap(self, rate: Callable[[float], float] | float, poisson: bool, at: float | None = None) -> float:
        now = rate(self.now if at is None else at) if callable(rate) else rate
        return self._random.expovariate(now) if poisson else 1 / now

    def _arrive(self, at: float) -> None:
        self.meter.arrived(1, at)
        if len(self._waiting) + len(self._running) >= self.batch + self.places:
            self.rejected += 1
            return
        policy = "full" if self._random.random() < self.named else policy_at(self.controller.accuracy)
        self._waiting.append(Request(policy, at, self.output_tokens))

    def _decide(self) -> None:
        waiting = sum(request.first is None for request in (*self._waiting, *self._running))
        queue = Queue(len(self._waiting) + len(self._running), waiting * self.prompt_tokens, self.batch, self.places)
        load = self.meter.load(queue, self.now, self.controller.changed_at, price_at)
        self.decisions.append(self.controller.decide(self.objective, load, self.now))
        self._next_decision = self.now + Control().interval_seconds

    def _step(self) -> None:
        decoding = [*self._running]
        admitted = []
        while self._waiting and len(self._running) < self.batch:
            admitted.append(self._waiting.popleft())
            self._running.append(admitted[-1])
        seconds = 0.0
        if decoding:
            prices = [PRICES[request.policy] for request in decoding]
            part = (max(prices) + sum(prices) / self.batch) / 2 * self.price_share + 1 - self.price_share
            seconds += self.step_seconds * part * (0.5 + 0.5 * len(decoding) / self.batch)
        seconds += sum(self.prompt_tokens * self.step_seconds / 200 * PRICES[request.policy] for request in admitted)
        seconds *= 1 + self.noise * (2 * self._random.random() - 1)
        begun = self.now if self._ended is None else self._ended
        self.now += seconds
        stats = StepStats(seconds, 0, len(decoding), len(self._running), len(self._waiting), 0.0, 0)
        for request in self._running:
            if request.first is None:
                request.first = self.now
                self.served.append((request.arrived, request.policy, self.now - request.arrived))
                stats.first_token_seconds.append((request.policy, self.now - request.arrived))
            else:
                stats.inter_token_seconds.append((request.policy, self.now - request.last))
            request.last, request.left = self.now, request.left - 1
        for request in decoding:
            stats.decode_rows[request.policy] = stats.decode_rows.get(request.policy, 0) + 1
        for request in admitted:
            stats.prefilled_tokens[request.policy] = stats.prefilled_tokens.get(request.policy, 0) + self.prompt_tokens
        for request in [request for request in self._running if request.left == 0]:
            self._running.remove(request)
            first, whole = (request.first or 0.0) - request.arrived, self.now - request.arrived
            lengths = (self.prompt_tokens, self.output_tokens)
            stats.finished.append(RequestStats("x", request.policy, FinishReason.LENGTH, *lengths, 0, 0.0, first, whole, ()))
        busy = bool(self._waiting or self._running)
        self._ended = self.now if busy else None
        self.meter.observe(replace(stats, interval_seconds=self.now - begun), self.now)
