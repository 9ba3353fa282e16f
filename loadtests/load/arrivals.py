"""When requests arrive. All times are in seconds since the start of the test; every schedule is made before the test begins.

Open loop: a request is sent when it is due, however many are still waiting for their answers. So a slow server gets no relief.
"""

import csv
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

Rate = Callable[[float], float]  # requests per second, by the time


@dataclass(frozen=True, slots=True)
class Arrival:
    """`prompt_tokens`, `output_tokens`: given by a trace; None if the workload decides."""

    at: float
    prompt_tokens: int | None = None
    output_tokens: int | None = None


def constant(rate: float) -> Rate:
    """The same rate all the time."""
    return lambda at: rate


def burst(rate: float, peak: float, begin: float, seconds: float) -> Rate:
    """`peak` for `seconds` from `begin`, and `rate` before and after."""
    return lambda at: peak if begin <= at < begin + seconds else rate


def ramp(rate: float, last: float, seconds: float) -> Rate:
    """From `rate` to `last` in a straight line within `seconds`."""
    return lambda at: rate + (last - rate) * min(at / seconds, 1.0)


def arrivals(rate: Rate, seconds: float, seed: int, poisson: bool) -> list[Arrival]:
    """Arrivals for so many seconds. `poisson`: with random gaps; otherwise with equal ones.

    A time-varying rate is followed exactly: the integral of the rate between two arrivals is 1, or exponentially distributed.
    """
    draw = random.Random(seed)
    made, at, step = [], 0.0, 0.001
    left = draw.expovariate(1.0) if poisson else 1.0
    while at < seconds:
        passed = rate(at) * step
        while left <= passed:
            when = at + step * left / passed
            if when < seconds:
                made.append(Arrival(when))
            left += draw.expovariate(1.0) if poisson else 1.0
        left -= passed
        at += step
    return made


def trace(path: Path, seconds: float, speed: float = 1.0) -> list[Arrival]:
    """The beginning of a trace in the format of Azure's LLM traces: TIMESTAMP, ContextTokens, GeneratedTokens.

    `speed`: how many times faster than it was recorded. Raises ValueError for a file of another format.
    """
    return list(_read(path, seconds, speed))


def _read(path: Path, seconds: float, speed: float) -> Iterator[Arrival]:
    with path.open(newline="", encoding="utf-8") as file:
        begin: datetime | None = None
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                when = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
                tokens = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: must have TIMESTAMP, ContextTokens, GeneratedTokens") from error
            begin = begin or when
            at = (when - begin).total_seconds() / speed
            if at >= seconds:
                return
            yield Arrival(at, *tokens)
