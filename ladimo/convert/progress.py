"""How far long work is: a bar on a terminal, elsewhere a plain line at least every 30 seconds.

Work says what it does with `track`, as it would with tqdm. Loops may be nested: the line names all of them. Lines are said by a
thread, so that one long step does not keep them back.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

INTERVAL = 30.0  # seconds from one line to the next, at most

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Loop:
    """One loop that is under way. done: items that are finished. started: seconds, by the progress' clock."""

    what: str
    total: int | None
    started: float
    done: int = 0


class Progress:
    """The loops under way, outermost first, and when the last line was said.

    say: takes a line. clock: seconds. interval: seconds after which `tick` says another line.
    """

    def __init__(
        self,
        say: Callable[[str], None] = logger.info,
        clock: Callable[[], float] = time.monotonic,
        interval: float = INTERVAL,
    ) -> None:
        self._say, self._clock, self._interval = say, clock, interval
        self._loops: list[Loop] = []
        self._last = clock()

    def track(self, items: Iterable[Item], what: str, total: int | None) -> Iterator[Item]:
        """The items, counted as they are finished."""
        loop = Loop(what, total, self._clock())
        if not self._loops:
            self._last = loop.started
        self._loops.append(loop)
        try:
            for item in items:
                yield item
                loop.done += 1
                self.tick()
        finally:
            if loop in self._loops:  # whoever leaves a loop early leaves those inside it, too
                del self._loops[self._loops.index(loop) :]

    def tick(self) -> None:
        """Say a line when the last one is at least `interval` seconds old and something is under way."""
        now = self._clock()
        loops = list(self._loops)
        if loops and now - self._last >= self._interval:
            self._last = now
            self._say(describe(loops, now))


def describe(loops: list[Loop], now: float) -> str:
    """Such as "layers 3 of 30 (steps 150 of 400): 80 s so far, about 12 min left"."""
    counts = [loop.what if loop.total is None else f"{loop.what} {loop.done} of {loop.total}" for loop in loops]
    inner = f" ({', '.join(counts[1:])})" if len(counts) > 1 else ""
    elapsed = now - loops[0].started
    share = 0.0  # of the outermost loop that is done
    for loop in reversed(loops):
        share = min(1.0, (loop.done + share) / loop.total) if loop.total else 0.0
    left = f", about {duration(elapsed * (1 - share) / share)} left" if share > 0 else ""
    return f"{counts[0]}{inner}: {duration(elapsed)} so far{left}"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 180 else f"{seconds / 60:.0f} min"


_current: Progress | None = None


@contextmanager
def reporting(progress: Progress | None = None) -> Iterator[None]:
    """Inside, `track` reports to `progress` (None for lines in the log). On a terminal its bars are enough."""
    global _current
    if progress is None and sys.stderr.isatty():
        yield
        return
    before, _current = _current, progress or Progress()
    told, stopped = _current, threading.Event()

    def beat() -> None:
        while not stopped.wait(1.0):
            told.tick()

    thread = threading.Thread(target=beat, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        _current = before


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """The items, with a bar on a terminal, and counted wherever `reporting` is on. total: how many there are, where the items
    cannot say."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    bar: Iterable[Item] = tqdm(items, desc=f"  {what}", total=total, leave=False, disable=None)
    return bar if _current is None else _current.track(bar, what, total)
