"""Runs one function on many items, in processes on this machine.

Workers are not forked from a process that has computed, because CUDA and thread pools do not survive a fork. They are forked
from a server process that has only imported the code. So a worker need not import it again. All workers run torch on the same
number of CPU threads, because with another number the last bits of sums differ.
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
LOGGER = "ladimo"  # workers send the lines of this logger to the parent


def run_jobs(
    function: Callable[[Item], Result], items: Iterable[Item], jobs: int, threads: int = 1
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) as results come, from `jobs` processes with `threads` CPU threads each.

    One job runs in this process, on as many threads. `function`, the items and the results must be picklable. Large tensors
    should be in files, and the items should have their names. An item is taken from `items` only when a process is free for it,
    so at most `jobs` items are in work. Log lines of the workers appear in this process.

    Raises the first exception of a worker: ValueError, OSError and MemoryError as such, others as RuntimeError. Raises
    ChildProcessError if a worker was killed. The other workers are then killed at once. The same happens if the iterator is
    closed or the program is interrupted. So work that writes files must end in an atomic step.
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
    """Inside this context, torch uses `count` CPU threads in this process."""
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
    there.close()  # only the worker then holds this end, so the pipe closes when the worker ends
    workers[here] = process
    here.send(item)
    return here


def _receive(connection: Connection, process: BaseProcess, item: object) -> list[Any]:
    """Receive one message of a worker. Returns [result] if its item is done, and [] for a log line.

    Raises the worker's exception, and ChildProcessError if it was killed.
    """
    try:
        kind, *values = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise ChildProcessError(
            f"the process that worked on {item} ended with exit code {process.exitcode}; "
            f"a negative code is a signal; -9 mostly means that memory ran out: try fewer jobs"
        ) from None
    if kind == "log":
        name, level, message = values
        logging.getLogger(name).log(level, "%s", message)
        return []
    if kind == "error":
        raise values[0]
    return list(values)


class _Send(logging.Handler):
    """Sends log records to the parent, as text."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self.connection.send(("log", record.name, record.levelno, record.getMessage()))


class _Lines(io.TextIOWrapper):
    """A stream that is never a terminal, so that workers do not draw progress bars over each other."""

    def isatty(self) -> bool:
        return False


def _work(connection: Connection, function: Callable[[Any], Any], threads: int, level: int) -> None:
    """The main function of a worker. It works on items until the parent closes its end of the pipe."""
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
            message = ("error", portable(error))
        try:
            connection.send(message)
        except BrokenPipeError:
            return


def _end_with_parent() -> None:
    """End this worker if its parent is killed, because the next run will write the same files."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def portable(error: Exception) -> Exception:
    """The error in a form that can be pickled, with its message. The traceback is a note."""
    kind = next((kind for kind in (ValueError, OSError, MemoryError) if isinstance(error, kind)), None)
    portable = RuntimeError(f"{type(error).__name__}: {error}") if kind is None else kind(str(error))
    portable.add_note("".join(traceback.format_exception(error)))
    return portable
