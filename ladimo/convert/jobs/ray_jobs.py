"""Runs one function on many items, as tasks of a Ray cluster: `parallel.run_jobs` on many machines.

Ray is imported only here and only when it is asked for. It is the extra `ladimo[ray]`.
"""

import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from ladimo.convert.jobs.parallel import LOGGER, cpu_threads, portable

Item = TypeVar("Item")
Result = TypeVar("Result")
Line = tuple[str, int, str]  # logger, level and text
RETRIES = 5  # of a task whose worker or machine died
CONNECT_SECONDS = 10.0


def run_jobs_on_ray(
    function: Callable[[Item], Result], items: Iterable[Item], address: str, jobs: int | None = None, gpus: float = 0.0
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) as results come, from tasks of the cluster at `address`.

    address: as for `ray.init`: "auto", HOST:PORT or ray://HOST:PORT; "local" starts a cluster on this machine. jobs: how many
    tasks run at once; None: as many as the cluster has CPUs, or GPUs when a task needs some. Each task has one CPU thread and
    `gpus` GPUs. `function` must be importable on every machine, and files that it uses must have the same path there. An item
    is taken from `items` only when its task can start.

    A task whose worker or machine dies runs again, up to `RETRIES` times. So work that writes files must end in an atomic step,
    and must find nothing to do when it was done before. Log lines appear in this process when their task ends.

    Raises ValueError if Ray is not installed or the cluster cannot be reached, the first exception of a task as
    `parallel.run_jobs` does, and ChildProcessError if a task's workers died too often. Other tasks are then cancelled.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--ray needs Ray: pip install 'ladimo[ray]'") from None
    here = {"include_dashboard": False} if address == "local" else {}
    host, separator, port = address.rpartition(":")
    try:
        if separator and "//" not in host:  # Ray itself would try for many minutes
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **here)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"--ray {address}: {error}") from error
    working: dict[Any, Item] = {}
    try:
        if jobs is None:
            resources = ray.cluster_resources()
            jobs = int(resources.get("GPU", 0) / gpus if gpus else resources.get("CPU", 0))
        if jobs < 1:
            raise ValueError(f"--ray {address}: the cluster has no {'GPU' if gpus else 'CPU'}")
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_do)
        level, source = logging.getLogger(LOGGER).getEffectiveLevel(), iter(items)
        for item in islice(source, jobs):
            working[task.remote(function, item, level)] = item
        while working:
            (done,), _ = ray.wait(list(working), num_returns=1)
            yield working[done], _result(ray, done, working[done])
            del working[done]
            for item in islice(source, 1):
                working[task.remote(function, item, level)] = item
    finally:
        for one in working:
            ray.cancel(one, force=True)
        ray.shutdown()


def _result(ray: Any, done: Any, item: object) -> Any:
    """The result of a finished task. Its log lines are logged here."""
    try:
        result, error, lines = ray.get(done)
    except ray.exceptions.RayError as lost:
        raise ChildProcessError(f"the workers that Ray gave to {item} died {RETRIES + 1} times; the last: {lost}") from None
    for name, level, message in lines:
        logging.getLogger(name).log(level, "%s", message)
    if error is not None:
        raise error
    return result


def _do(function: Callable[[Any], Any], item: Any, level: int) -> tuple[Any, Exception | None, list[Line]]:
    """The task. It returns an exception instead of raising it: Ray would change its type."""
    lines = _Keep()
    logger = logging.getLogger(LOGGER)
    logger.addHandler(lines)
    logger.setLevel(level)
    try:
        with cpu_threads(1):
            return function(item), None, lines.kept
    except Exception as error:
        return None, portable(error), lines.kept
    finally:
        logger.removeHandler(lines)


class _Keep(logging.Handler):
    """Keeps log records as text."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Line] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append((record.name, record.levelno, record.getMessage()))
