"""Progress of long work: a bar on a terminal, elsewhere a line at least every 30 seconds.

Code reports its progress with `track`, which is used like tqdm. Loops may be nested. A line names all of them. A thread prints
the lines, so a long step does not delay them.
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

INTERVAL = 30.0  # the longest time between two lines, in seconds

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Loop:
    """One running loop. done: the number of finished items. started: the start time in seconds of the progress's clock."""

    what: str
    total: int | None
    started: float
    done: int = 0


class Progress:
    """The running loops, outermost first.

    say: prints a line. clock: returns the time in seconds. interval: the seconds after which `tick` prints the next line.
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
        """Yield the items, and count them as they are finished."""
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
            if loop in self._loops:  # leaving a loop early also leaves the loops inside it
                del self._loops[self._loops.index(loop) :]

    def tick(self) -> None:
        """Print a line if the last one is at least `interval` seconds old and a loop is running."""
        now = self._clock()
        loops = list(self._loops)
        if loops and now - self._last >= self._interval:
            self._last = now
            self._say(describe(loops, now))


def describe(loops: list[Loop], now: float) -> str:
    """A line such as "layers 3 of 30 (steps 150 of 400): 80 s so far, about 12 min left"."""
    counts = [loop.what if loop.total is None else f"{loop.what} {loop.done} of {loop.total}" for loop in loops]
    inner = f" ({', '.join(counts[1:])})" if len(counts) > 1 else ""
    elapsed = now - loops[0].started
    share = 0.0  # the finished share of the outermost loop
    for loop in reversed(loops):
        share = min(1.0, (loop.done + share) / loop.total) if loop.total else 0.0
    left = f", about {duration(elapsed * (1 - share) / share)} left" if share > 0 else ""
    return f"{counts[0]}{inner}: {duration(elapsed)} so far{left}"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 180 else f"{seconds / 60:.0f} min"


_current: Progress | None = None


@contextmanager
def reporting(progress: Progress | None = None) -> Iterator[None]:
    """Inside this context, `track` reports to `progress`. None: it writes lines to the log, except on a terminal, which has
    bars."""
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
    """Yield the items, with a bar on a terminal, and with lines inside `reporting`. total: the number of items, if `items` has
    no length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    bar: Iterable[Item] = tqdm(items, desc=f"  {what}", total=total, leave=False, disable=None)
    return bar if _current is None else _current.track(bar, what, total)
