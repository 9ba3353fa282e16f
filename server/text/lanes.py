"""Threads for work on texts. Long texts have a thread of their own, so short texts never wait for a long one.

The tokenizer is written in Rust and works without Python's lock, so its threads do not hold up the event loop.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# Characters or tokens of a short text, at most. Tokenizing this many takes some tens of milliseconds.
SHORT = 2**14

T = TypeVar("T")


class Lanes:
    """Two thread pools: one for short texts and one for long ones. A caller with many texts should submit one at a time."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(2, thread_name_prefix="tokenizer")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="tokenizer-long")

    async def run(self, work: Callable[[], T], size: int) -> T:
        """Run `work` on a thread and return its result. `size`: the characters or tokens that it handles."""
        lane = self._short if size <= SHORT else self._long
        return await asyncio.get_running_loop().run_in_executor(lane, work)

    def close(self) -> None:
        """Drop all waiting work. Does not wait for work that is running."""
        for lane in (self._short, self._long):
            lane.shutdown(wait=False, cancel_futures=True)
