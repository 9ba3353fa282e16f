"""A limit on the time that another engine may take, so that a slow one does not lose a whole run."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class TimeLimit:
    """The seconds that one engine may take in all: to load, to compile and to measure."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._used = 0.0
        self._since: float | None = None

    @property
    def left(self) -> float:
        """The seconds that are left; 0 at the end."""
        running = 0.0 if self._since is None else self._clock() - self._since
        return max(self.seconds - self._used - running, 0.0)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """The time inside counts. It may be longer than the limit: work in this process cannot be stopped."""
        self._since = self._clock()
        try:
            yield
        finally:
            self._used, self._since = self._used + self._clock() - self._since, None

    def __str__(self) -> str:
        return f"did not end within {self.seconds:g} s"
