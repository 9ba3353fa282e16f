"""What a server can do within the objectives: how many clients at a time, and how many requests per second.

Clients that ask again and again (closed loop) say how many requests may share the batch. The capacity itself is found with
requests that arrive at random times, whatever the server does (open loop), because that is how a burst arrives. It is the
largest rate at which ENOUGH of the requests are inside the objectives. All requests have fresh prompts and their full lengths.
"""

import argparse
import math
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from loadtests.load.arrivals import Arrival, arrivals, constant
from loadtests.load.client import Client
from loadtests.load.figures import Objectives, show, summary
from loadtests.load.workload import parse_routing, plan

ENOUGH = 0.9  # of the requests inside the objectives
MAX_TEXT = 200_000  # characters
FIRST_FACTOR, FINEST_FACTOR = 1.25, 1.07  # between two rates that are tried
MAX_TRIALS = 8
DRIFT = 1.2

Figures = dict[str, Any]


@dataclass(slots=True)
class Side:
    """One of the two runs: a default of the server, the size of its batch and queue, and its capacity in requests per second.

    `clients`, `rates`: the figures from which they were found. None: not known yet.
    """

    name: str
    accuracy: float
    max_num_seqs: int | None = None
    max_queue: int | None = None
    capacity: float | None = None
    clients: list[Figures] = field(default_factory=list)
    rates: list[Figures] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Probe:
    """Sends load to a server that nobody else uses. `args`: of the command, with lengths, seed and trial length."""

    def __init__(self, http: httpx.AsyncClient, tokens: Sequence[int], context: int, args: argparse.Namespace) -> None:
        self._http, self._tokens, self._context, self._args = http, tokens, context, args
        self._seed: int = args.seed

    @staticmethod
    async def open(http: httpx.AsyncClient, args: argparse.Namespace) -> "Probe":
        model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]
        text = args.text.read_text(encoding="utf-8")[:MAX_TEXT]
        tokens = (await http.post("/tokenize", json={"prompt": text})).raise_for_status().json()["tokens"]
        return Probe(http, tokens, model["max_model_len"], args)

    async def set_accuracy(self, accuracy: float) -> None:
        (await self._http.put("/admin/routing/default", json={"accuracy": accuracy})).raise_for_status()

    async def clients(self, number: int, objectives: Objectives) -> Figures:
        """The figures of so many clients that ask again and again."""
        due = [Arrival(0.0)] * max(self._args.clients_requests, 4 * number)
        outcomes = await Client(self._http).run_closed(self._plan(due), number)
        figures = {"clients": number, **summary(outcomes, objectives)}
        return _tell(f"{number} clients", figures)

    async def rate(self, rate: float, objectives: Objectives) -> Figures:
        """The figures of requests that arrive at this rate. Other rates get the same gaps, longer or shorter."""
        seconds = max(self._args.trial_seconds, self._args.trial_requests / rate)
        due = arrivals(constant(rate), seconds, self._args.seed, poisson=True)
        outcomes, _ = await Client(self._http).run(self._plan(due))
        return _tell(f"{rate:.2f} requests/s", {"rate": rate, **summary(outcomes, objectives)})

    def _plan(self, due: Sequence[Arrival]) -> Any:
        self._seed += 1  # so that no prompt comes twice
        lengths = (self._args.prompt_tokens, self._args.output_tokens)
        return plan(due, self._tokens, *lengths, [parse_routing("default")], 0.0, self._context, self._seed)


async def find_places(
    clients: Callable[[int], Awaitable[Figures]], side: Side, objectives: Objectives, most: int
) -> list[Figures]:
    """Set the places of the batch and of the queue, where the side has None. Returns what was measured.

    The batch has as many places as clients at a time still meet the objectives, `most` of them at most. The queue has room for
    what they complete within the objective of the first token. Whoever waits for the last place in the queue is then only just
    in time. Raises ValueError if neither one client nor two meet the objectives.
    """
    assert objectives.ttft is not None
    side.clients = []
    for number in [side.max_num_seqs] if side.max_num_seqs else range(1, most + 1):
        side.clients.append(await clients(number))
        if len(side.clients) > 1 and all(each["good_share"] < ENOUGH for each in side.clients[-2:]):
            break  # one number that misses may be chance
    fit = [each for each in side.clients if each["good_share"] >= ENOUGH] or side.clients[: side.max_num_seqs or 0]
    if not fit:
        raise ValueError(f"--goodput: one client alone and two miss the objectives at accuracy {side.accuracy:g}")
    side.max_num_seqs = side.max_num_seqs or fit[-1]["clients"]
    if side.max_queue is None:
        left = max(objectives.ttft - fit[-1]["p90_ttft_ms"], 0.0) / 1000
        side.max_queue = max(math.floor(fit[-1]["request_throughput"] * left), 1)
    return side.clients


async def find_capacity(rate: Callable[[float], Awaitable[Figures]], side: Side, begin: float) -> float:
    """The largest rate at which ENOUGH requests meet the objectives. The search begins at `begin`, goes up or down by a factor
    until the capacity lies between two rates, and then halves the distance.

    Raises ValueError if MAX_TRIALS rates are not enough.
    """
    side.rates = []
    low, high, now = 0.0, math.inf, begin
    for _ in range(MAX_TRIALS):
        side.rates.append(await rate(now))
        if side.rates[-1]["good_share"] >= ENOUGH:
            low = now
        else:
            high = now
        if low and high / low <= FINEST_FACTOR:
            break
        now = math.sqrt(low * high) if low and high < math.inf else low * FIRST_FACTOR if low else high / FIRST_FACTOR
    if not low:
        raise ValueError(f"{side.name}: even {side.rates[-1]['rate']:.2f} requests per second miss the objectives")
    side.capacity = low
    return low


def check(fixed: Side, cheapest: Side, first: Figures | None = None, drift: float = DRIFT) -> None:
    """Refuse figures that contradict each other, as those of a machine with other work do. `first`: an earlier measurement of
    the fixed policy with as many clients. `drift`: by this factor, two measurements of the same may differ.

    Raises ValueError naming the contradiction.
    """
    for side in (fixed, cheapest):
        for fewer, more in zip(side.clients, side.clients[1:], strict=False):
            if fewer["p90_tpot_ms"] > drift * more["p90_tpot_ms"]:
                _refuse(
                    f"at accuracy {side.accuracy:g}, {fewer['clients']} at a time had {fewer['p90_tpot_ms']:.1f} ms per token, "
                    f"but {more['clients']} at a time had only {more['p90_tpot_ms']:.1f} ms"
                )
    for again in fixed.clients if first is not None else ():
        assert first is not None
        if again["clients"] == first["clients"]:
            slow, fast = sorted((first["p90_tpot_ms"], again["p90_tpot_ms"]), reverse=True)
            if slow > drift * fast:
                _refuse(f"{first['clients']} clients had {slow:.1f} and {fast:.1f} ms per token, in two measurements")
    both_searched = len(fixed.clients) > 1 and len(cheapest.clients) > 1
    if both_searched and (fixed.max_num_seqs or 0) >= (cheapest.max_num_seqs or 0) > 1:
        _refuse(
            f"{fixed.max_num_seqs} clients at a time meet the objectives at accuracy {fixed.accuracy:g}, and only "
            f"{cheapest.max_num_seqs} at accuracy {cheapest.accuracy:g}"
        )
    if fixed.capacity is not None and cheapest.capacity is not None and fixed.capacity >= cheapest.capacity:
        _refuse(
            f"the capacity is {fixed.capacity:.2f} requests per second at accuracy {fixed.accuracy:g}, and "
            f"{cheapest.capacity:.2f} at accuracy {cheapest.accuracy:g}"
        )


def _refuse(contradiction: str) -> None:
    raise ValueError(f"the calibration contradicts itself: {contradiction}; run it again on a quiet machine")


def _tell(name: str, figures: Figures) -> Figures:
    names = ("request_throughput", "good_share", "p90_ttft_ms", "p90_tpot_ms")
    print(f"{name}: " + ", ".join(f"{each} {show(figures[each])}" for each in names), file=sys.stderr)
    return figures
