"""What the workers of `test_parallel` and `test_ray_jobs` do. They import this module, so it imports little."""

import logging
import os
import signal
import sys
from pathlib import Path

import torch

logger = logging.getLogger("ladimo.convert.test_parallel")


def square(number: int) -> tuple[int, int, bool]:
    logger.info("squaring %d", number)
    return number * number, torch.get_num_threads(), sys.stderr.isatty()


def fail(number: int) -> int:
    raise ValueError(f"layer {number} is no good")


def kill_itself(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_once(marker: Path) -> str:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker.name


def wait_or_fail(fifo: Path | None) -> None:
    """Waits for a writer that never comes."""
    if fifo is None:
        raise ValueError("one failed")
    fifo.read_text()


class OddError(Exception):
    """Cannot be made from its message alone."""

    def __init__(self, number: int, place: str) -> None:
        super().__init__(f"{number} at {place}")


def hold_open(fifo: Path) -> None:
    with fifo.open("wb", buffering=0) as file:
        file.write(b"x")
        signal.pause()
