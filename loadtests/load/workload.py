"""What is asked: prompts, lengths, routing and cancellations. Everything follows from the seed, so two runs ask the same."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.load.arrivals import Arrival

DEFAULT = "default"  # the routing of a request that names none


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths in tokens, uniform between `low` and `high`."""

    low: int
    high: int

    def draw(self, random: random.Random) -> int:
        return random.randint(self.low, self.high)


def parse_lengths(text: str) -> Lengths:
    """LENGTH or LOW-HIGH. Raises ValueError."""
    low, _, high = text.partition("-")
    lengths = Lengths(int(low), int(high or low))
    if not 1 <= lengths.low <= lengths.high:
        raise ValueError(text)
    return lengths


@dataclass(frozen=True, slots=True)
class Routing:
    """A kind of request and its share. `field` None: the request has no field `routing`."""

    name: str
    share: float
    field: str | dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Planned:
    """One request. `cancel_after`: the client leaves after so many tokens; None: it stays."""

    at: float
    prompt: list[int]
    output_tokens: int
    routing: Routing
    cancel_after: int | None
    seed: int


def plan(
    arrivals: Sequence[Arrival],
    text: Sequence[int],
    prompt_tokens: Lengths,
    output_tokens: Lengths,
    routings: Sequence[Routing],
    cancelled: float,
    context: int,
    seed: int,
) -> list[Planned]:
    """The requests of the test. Prompts are parts of `text`, from random places, so they rarely share a prefix.

    Lengths of a trace are cut to the context. Raises ValueError if other lengths do not fit it, or if the text is too
    short.
    """
    longest = prompt_tokens.high + output_tokens.high + 1
    if longest > context and not all(arrival.prompt_tokens and arrival.output_tokens for arrival in arrivals):
        raise ValueError(f"prompts and answers have up to {longest - 1} tokens, but the context has room for {context - 1}")
    draw = random.Random(seed + 1)
    planned = []
    for number, arrival in enumerate(arrivals):
        answer = min(arrival.output_tokens, context // 2) if arrival.output_tokens else output_tokens.draw(draw)
        length = max(min(arrival.prompt_tokens or prompt_tokens.draw(draw), context - answer - 1), 1)
        if length > len(text):
            raise ValueError(f"the text has {len(text)} tokens, but a prompt needs {length}")
        start = draw.randrange(len(text) - length + 1)
        routing = draw.choices(routings, [routing.share for routing in routings])[0]
        leaves = draw.randint(1, answer) if draw.random() < cancelled else None
        planned.append(Planned(arrival.at, list(text[start : start + length]), answer, routing, leaves, number))
    return planned


def parse_routing(text: str) -> Routing:
    """NAME, NAME=SHARE, auto:FLOOR=SHARE or accuracy:X=SHARE. `default` names no routing. Raises ValueError."""
    choice, _, share = text.partition("=")
    kind, _, number = choice.partition(":")
    weight = float(share) if share else 1.0
    if weight <= 0:
        raise ValueError(f"{text}: the share must be positive")
    if choice == DEFAULT:
        return Routing(choice, weight, None)
    if not number:
        return Routing(choice, weight, choice)
    if kind == "accuracy":
        return Routing(choice, weight, {"accuracy": float(number)})
    return Routing(choice, weight, {"policy": kind, "min_accuracy": float(number)})
