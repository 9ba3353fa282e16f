"""Work in several processes: the same results, lazily fed, one clear error, and nobody left behind."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ladimo.convert.jobs.parallel import cpu_threads, portable, run_jobs
from ladimo.convert.pipeline import convert
from tests.ladimo.convert.conftest import small_recipe
from tests.ladimo.convert.jobs.jobs import OddError, fail, kill_itself, logger, square, wait_or_fail


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_and_log_lines_arrive(jobs: int, caplog: pytest.LogCaptureFixture) -> None:
    """Items may be large: no more of them are out than there are processes. Each works on the threads asked for."""
    caplog.set_level("INFO", logger="ladimo")
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(6):
            taken.append(number)
            yield number

    results = {}
    with cpu_threads(3):
        for item, result in run_jobs(square, items(), jobs, threads=1):
            results[item] = result
            assert len(taken) < len(results) + jobs
        assert torch.get_num_threads() == 3
    assert results == {number: (number * number, 1, False) for number in range(6)}
    lines = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert sorted(lines) == [f"squaring {number}" for number in range(6)]


def test_no_items_need_no_process() -> None:
    assert list(run_jobs(square, [], 3)) == []
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        next(run_jobs(square, [1], 0))


def test_a_failure_is_one_error_and_ends_the_others_at_once(tmp_path: Path) -> None:
    """The other worker waits for something that never comes; only its end lets this test end."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ValueError, match="^one failed\n") as caught:
        list(run_jobs(wait_or_fail, [fifo, None], 2))
    assert str(caught.value) == "one failed"
    assert "wait_or_fail" in caught.value.__notes__[0]  # what --debug shows


def test_an_error_of_the_only_job_stays_as_it_is() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="^layer 3 is no good$"):
        list(run_jobs(fail, [3], 1))
    assert torch.get_num_threads() == before


def test_a_killed_worker_is_one_clear_error() -> None:
    with pytest.raises(OSError, match=r"worked on 7 ended with exit code -9;.*try fewer jobs"):
        list(run_jobs(kill_itself, [7], 2))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("tau"), ValueError, "tau"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), ValueError, "'utf-8' codec can't decode byte 0x78 in position 0: bad"),
        (OSError(28, "No space left on device", "a/b"), OSError, "[Errno 28] No space left on device: 'a/b'"),
        (OddError(1, "here"), RuntimeError, "OddError: 1 at here"),
    ],
)
def test_errors_travel(error: Exception, kind: type[Exception], message: str) -> None:
    arrived = pickle.loads(pickle.dumps(portable(error)))
    assert (type(arrived), str(arrived)) == (kind, message)
    assert message in arrived.__notes__[0]


@pytest.mark.long
def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    """Else they would go on writing beside the run that resumes. The worker holds a pipe's end; its closing is its death."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal\n"
        "from pathlib import Path\n"
        "from ladimo.convert.jobs.parallel import run_jobs\n"
        "from tests.ladimo.convert.jobs.jobs import hold_open\n"
        "if __name__ == '__main__':\n"
        f"    for _ in run_jobs(hold_open, [Path({str(tmp_path / 'held')!r})], 2):\n"
        "        pass\n"
    )
    held = tmp_path / "held"
    os.mkfifo(held)
    root = Path(__file__).parents[4]
    parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)})
    try:
        with held.open("rb") as ours:
            assert ours.read(1) == b"x"  # a worker is at work
            parent.kill()
            parent.wait()
            ours.read()  # returns when the last writer is gone
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.long
def test_layers_trained_side_by_side_are_those_trained_in_turn(source: Path, text: Path, tmp_path: Path) -> None:
    """Byte for byte, where every layer gets one thread."""
    weights = {}
    for jobs in (1, 2):
        with cpu_threads(jobs):
            assert convert(str(source), tmp_path / str(jobs), small_recipe(), [text], jobs=jobs)
        weights[jobs] = (tmp_path / str(jobs) / "model.safetensors").read_bytes()
    assert weights[1] == weights[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
