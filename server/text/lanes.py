"""Threads for work on texts. Rust encodes without Python's lock, so a text of a megabyte holds up only those that stand behind
it: it has a lane of its own."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# Characters or tokens. Tokenizing so much takes some tens of milliseconds.
SHORT = 2**14

T = TypeVar("T")


class Lanes:
    """Short texts take turns among themselves, long ones likewise. Who has many texts hands in one at a time."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(2, thread_name_prefix="tokenizer")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="tokenizer-long")

    async def run(self, work: Callable[[], T], size: int) -> T:
        """`size`: characters or tokens that `work` deals with."""
        lane = self._short if size <= SHORT else self._long
        return await asyncio.get_running_loop().run_in_executor(lane, work)

    def close(self) -> None:
        for lane in (self._short, self._long):
            lane.shutdown(wait=False, cancel_futures=True)
