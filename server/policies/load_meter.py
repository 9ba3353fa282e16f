"""What the server knows of its load: latencies, demand, step costs, and what follows from them for the next request.

It has no clock. All times are passed in, in seconds of one monotonic clock.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from server.engine.messages import StepStats
from server.policies.costs import Demand, StepCosts

LATENCY_SECONDS = 8.0  # so old are the latencies that are measured; older ones belong to an earlier load
MAX_SAMPLES = 4096
ARRIVAL_SECONDS = 10.0
RUSH_SECONDS = 3.0  # a rush of requests shows within this time
FADING = 0.98  # the weight of a finished sequence after one more, and of a step's prices after one more step


@dataclass(frozen=True, slots=True)
class Queue:
    """`in_flight`: sequences that wait or run, of which `batch` run at once and `places` may wait. `waiting_tokens`: prompt
    tokens of those that have no first token yet."""

    in_flight: int
    waiting_tokens: int
    batch: int
    places: int

    @property
    def share(self) -> float:
        """How full it is, 0 to 1."""
        return min(max(self.in_flight - self.batch, 0) / self.places, 1.0) if self.places else 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """90th percentiles of recent latencies in seconds: between tokens, and to the first token. None without a sample."""

    itl_seconds: float | None = None
    ttft_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """Latencies in seconds and the utilisation, 1 for a server that just keeps up, if all requests ran at one accuracy."""

    itl_seconds: float
    ttft_seconds: float
    utilisation: float


@dataclass(frozen=True, slots=True)
class Load:
    """All that the controller looks at.

    wait_seconds: the time that a request would wait that came now. queue_share: how full the queue is, 0 to 1.
    request_seconds: how long a request takes on average. arrivals: sequences asked for in the last ARRIVAL_SECONDS.
    token_seconds: by accuracy, the mean time between two tokens if all sequences in the server ran at it; 0 if unknown.
    forecast: by accuracy; None while too little is known. rush: the same if requests went on to arrive as in the last
    RUSH_SECONDS, or as in the last ARRIVAL_SECONDS if these were more per second; None until steps of several prices were seen.
    """

    wait_seconds: float = 0.0
    queue_share: float = 0.0
    measured: Measured = Measured()
    request_seconds: float = 0.0
    arrivals: int = 0
    token_seconds: Callable[[float], float] = lambda accuracy: 0.0
    forecast: Callable[[float], Forecast | None] = lambda accuracy: None
    rush: Callable[[float], Forecast | None] = lambda accuracy: None


class Mean:
    """A mean in which old values fade. 0 before the first value."""

    def __init__(self) -> None:
        self.value = self._weight = 0.0

    def add(self, value: float) -> None:
        self._weight = FADING * self._weight + 1
        self.value += (value - self.value) / self._weight


class LoadMeter:
    """Collects from engine steps and arrivals. `price`: of a policy by name, 0 to 1."""

    def __init__(self, price: Callable[[str], float] = lambda policy: 1.0) -> None:
        self.costs = StepCosts()
        self.price_of = price
        self._itl: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)
        self._ttft: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)
        self._arrivals: deque[tuple[float, int]] = deque()
        self._num_arrived = 0
        self._price, self._prompt, self._output, self._duration, self._chunk = Mean(), Mean(), Mean(), Mean(), Mean()

    def arrived(self, sequences: int, now: float) -> None:
        """Sequences were asked for, whether they were admitted or not."""
        self._arrivals.append((now, sequences))
        self._num_arrived += sequences
        self.arrivals(now)  # forgets the old ones

    def observe(self, stats: StepStats, now: float) -> None:
        """Learn from one engine step."""
        self._itl.extend((now, seconds) for _, seconds in stats.inter_token_seconds)
        self._ttft.extend((now, seconds) for _, seconds in stats.first_token_seconds)
        rows, tokens = self._by_price(stats.decode_rows), self._by_price(stats.prefilled_tokens)
        if rows or tokens:
            self.costs.observe(rows, tokens, stats.interval_seconds)
        if tokens and stats.prompt_limit:
            self._chunk.add(stats.prompt_limit)
            self.costs.chunk_tokens = self._chunk.value
        if rows:
            self._price.add(sum(price * count for price, count in rows.items()) / sum(rows.values()))
        for request in stats.finished:
            if request.time_to_first_token_seconds is not None:
                self._prompt.add(request.prompt_tokens - request.cached_tokens)
                self._output.add(request.generation_tokens)
                self._duration.add(request.e2e_seconds)

    def demand(self, now: float) -> Demand:
        """Of the last ARRIVAL_SECONDS."""
        return Demand(self.arrivals(now) / ARRIVAL_SECONDS, self._prompt.value, self._output.value)

    def arrivals(self, now: float) -> int:
        """Sequences asked for in the last ARRIVAL_SECONDS."""
        while self._arrivals and self._arrivals[0][0] <= now - ARRIVAL_SECONDS:
            self._num_arrived -= self._arrivals.popleft()[1]
        return self._num_arrived

    def _rush(self, now: float) -> float:
        """Sequences per second that were asked for lately."""
        recent = 0
        for at, sequences in reversed(self._arrivals):
            if at <= now - RUSH_SECONDS:
                break
            recent += sequences
        return recent / RUSH_SECONDS

    @property
    def price(self) -> float:
        """The mean price of the rows of recent steps; 1 before the first."""
        return self._price.value or 1.0

    def measured(self, now: float, since: float = -math.inf) -> Measured:
        """Percentiles of the latencies after `since`, at most LATENCY_SECONDS old."""
        begin = max(now - LATENCY_SECONDS, since)
        return Measured(*(_p90(seconds for at, seconds in samples if at >= begin) for samples in (self._itl, self._ttft)))

    def completion_seconds(self, sequences: int, batch: int, price: float | None = None) -> float:
        """How long it takes until so many sequences of a full batch have ended, at the present mean price or at the given one.
        0 while too little is known."""
        lengths = Demand(0.0, self._prompt.value, self._output.value)
        return sequences * self.costs.sequence_seconds(lengths, batch, self.price if price is None else price)

    def wait_seconds(self, queue: Queue, price: float | None = None) -> float:
        """How long the newest sequence of the queue waits: until the prompts before it are computed, and until there is a place
        in the batch for it. `price`: of all before it; None: the present mean price. 0 if nothing is before it, and while too
        little is known."""
        prompts = self.costs.prompt_seconds(queue.waiting_tokens, self.price if price is None else price)
        return max(prompts, self.completion_seconds(max(queue.in_flight - queue.batch, 0), queue.batch, price))

    def least_wait_seconds(self, queue: Queue, price: float) -> float | None:
        """The same at the lowest price that automatic control may choose. None until steps of several prices have been seen."""
        return self.wait_seconds(queue, price) if self.costs.prices_known else None

    def answer_seconds(self, queue: Queue, price: float, now: float, token_limit: int | None = None) -> float:
        """How long the newest sequence of the queue needs until its end, if it has this price and the mean length, or at most
        `token_limit` tokens."""
        token = self.costs.token_seconds(self.demand(now), queue.batch, price) if self.costs.known else 0.0
        length = self._output.value if token_limit is None else min(self._output.value, token_limit)
        return self.wait_seconds(queue) + length * token

    def load(self, queue: Queue, now: float, since: float, price_at: Callable[[float], float]) -> Load:
        """The load now, with latencies after `since`. `price_at`: the price by accuracy."""
        measured, demand, batch = self.measured(now, since), self.demand(now), queue.batch
        rush = replace(demand, sequences_per_second=max(demand.sequences_per_second, self._rush(now)))
        load = Load(
            wait_seconds=self.wait_seconds(replace(queue, in_flight=queue.in_flight + 1)),
            queue_share=queue.share,
            measured=measured,
            request_seconds=self._duration.value,
            arrivals=self.arrivals(now),
            token_seconds=lambda accuracy: self._token_seconds(min(queue.in_flight + 1, batch), rush, price_at(accuracy)),
            forecast=self._forecast(demand, measured, batch, price_at),
        )
        return replace(load, rush=self._forecast(rush, measured, batch, price_at)) if self.costs.prices_known else load

    def _token_seconds(self, rows: int, demand: Demand, price: float) -> float:
        """The time between two tokens while so many rows decode, and prompts arrive and take their share of the time."""
        prompts = demand.sequences_per_second * self.costs.prompt_seconds(demand.prompt_tokens, price)
        return self.costs.step_seconds(rows, price) / (1 - min(prompts, 0.9))

    def _forecast(
        self, demand: Demand, measured: Measured, batch: int, price_at: Callable[[float], float]
    ) -> Callable[[float], Forecast | None]:
        """By accuracy, if this is asked for. What was measured knows of all that the costs leave out. So take only ratios from
        the costs."""
        costs = self.costs
        base = costs.token_seconds(demand, batch, self.price) if costs.known else 0.0

        def forecast(accuracy: float) -> Forecast | None:
            if not base or not demand.output_tokens:
                return None
            price = price_at(accuracy)
            token = costs.token_seconds(demand, batch, price)
            first = costs.prompt_seconds(demand.prompt_tokens, price) + token
            itl = token if measured.itl_seconds is None else measured.itl_seconds * token / base
            ttft = first if measured.ttft_seconds is None else measured.ttft_seconds * token / base
            return Forecast(itl, ttft, costs.utilisation(demand, batch, price))

        return forecast

    def _by_price(self, counts: dict[str, int]) -> dict[float, int]:
        prices: dict[float, int] = {}
        for policy, count in counts.items():
            price = self.price_of(policy)
            prices[price] = prices.get(price, 0) + count
        return prices


def _p90(samples: Iterable[float]) -> float | None:
    ordered = sorted(samples)
    return ordered[math.ceil(0.9 * len(ordered)) - 1] if ordered else None
