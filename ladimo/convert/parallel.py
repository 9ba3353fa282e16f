"""One function for many items, in processes on this machine.

Workers are never forked from a process that has computed, because CUDA and thread pools do not survive a fork. They are forked
from a server process that has only imported the code, so that a worker need not import it again. All run torch on the same
number of CPU threads, because sums taken by another number of threads differ in their last bits.
"""

import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
LOGGER = "ladimo"  # the logger whose lines workers hand over


def run_jobs(
    function: Callable[[Item], Result], items: Iterable[Item], jobs: int, threads: int = 1
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) in the order in which results come, from `jobs` processes with `threads` CPU threads each.

    With one job the work is done in this process, on as many threads. `function`, the items and the results must be
    picklable. Large tensors belong in files whose names the items hold. An item is taken from `items` only when a process is
    free for it, so at most `jobs` items are out at once. Log lines of the workers appear in this process.

    Raises the first exception that a worker met: ValueError, OSError and MemoryError as such, others as RuntimeError. Raises
    ChildProcessError when a worker was killed. The other workers are then ended at once, and so they are when the iterator is
    closed or the program interrupted. Work in files must therefore end in an atomic step.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if jobs == 1:
        with cpu_threads(threads):
            for item in items:
                yield item, function(item)
        return
    source = iter(items)
    workers: dict[Connection, BaseProcess] = {}
    working: dict[Connection, Item] = {}
    try:
        for item in source:
            working[_start(workers, function, threads, item)] = item
            if len(workers) == jobs:
                break
        while working:
            for connection in wait(list(working)):
                assert isinstance(connection, Connection)
                done = _receive(connection, workers[connection], working[connection])
                if not done:
                    continue
                yield working.pop(connection), done[0]
                for item in source:
                    connection.send(item)
                    working[connection] = item
                    break
    finally:
        for connection, process in workers.items():
            if connection in working:
                process.kill()
            connection.close()  # an idle worker ends by itself
        for process in workers.values():
            process.join()


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Inside, torch uses this many CPU threads in the calling process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start(workers: dict[Connection, BaseProcess], function: Callable[[Item], Result], threads: int, item: Item) -> Connection:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, function.__module__])  # of the first call: the server process then runs
    here, there = context.Pipe()
    level = logging.getLogger(LOGGER).getEffectiveLevel()
    process = context.Process(target=_work, args=(there, function, threads, level), daemon=True)
    process.start()
    there.close()  # then the pipe ends when the worker ends
    workers[here] = process
    here.send(item)
    return here


def _receive(connection: Connection, process: BaseProcess, item: object) -> list[Any]:
    """One message of a worker: [result] when its item is done, [] when it was a log line."""
    try:
        kind, *values = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise ChildProcessError(
            f"the process that worked on {item} ended with exit code {process.exitcode}; "
            f"a negative code is a signal, -9 most often memory running out: try fewer jobs"
        ) from None
    if kind == "log":
        name, level, message = values
        logging.getLogger(name).log(level, "%s", message)
        return []
    if kind == "error":
        raise values[0]
    return list(values)


class _Send(logging.Handler):
    """Log records to the parent, as text."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self.connection.send(("log", record.name, record.levelno, record.getMessage()))


class _Lines(io.TextIOWrapper):
    """A stream that denies being a terminal, so that workers draw no progress bars over each other."""

    def isatty(self) -> bool:
        return False


def _work(connection: Connection, function: Callable[[Any], Any], threads: int, level: int) -> None:
    """The life of a worker: items come until the parent closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stderr = _Lines(sys.stderr.buffer, line_buffering=True)
    torch.set_num_threads(threads)
    logger = logging.getLogger(LOGGER)
    logger.addHandler(_Send(connection))
    logger.propagate = False
    logger.setLevel(level)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            message: tuple[Any, ...] = ("done", function(item))
        except Exception as error:
            message = ("error", _portable(error))
        try:
            connection.send(message)
        except BrokenPipeError:
            return


def _end_with_parent() -> None:
    """End this worker when its parent is killed: the next run will write the same files."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error as one that can be pickled, with its message. A note holds the traceback."""
    kind = next((kind for kind in (ValueError, OSError, MemoryError) if isinstance(error, kind)), None)
    portable = RuntimeError(f"{type(error).__name__}: {error}") if kind is None else kind(str(error))
    portable.add_note("".join(traceback.format_exception(error)))
    return portable
