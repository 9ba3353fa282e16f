"""How far long work is: a plain line at least every so many seconds, whatever the work is nested in."""

import logging
import re
import time
from pathlib import Path

import pytest

from ladimo.convert.pipeline import convert
from ladimo.convert.progress import Progress, reporting, track
from tests.ladimo.convert.conftest import Made


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_says_stage_place_time_and_rest() -> None:
    clock, lines = Clock(), list[str]()
    progress = Progress(lines.append, clock, interval=30.0)
    for _ in progress.track(range(4), "layers", 4):
        for _ in progress.track(range(10), "steps", 10):
            clock.now += 2.0
    assert lines == [
        "layers 1 of 4 (steps 5 of 10): 30 s so far, about 50 s left",
        "layers 2 of 4 (steps 10 of 10): 60 s so far, about 20 s left",
    ]


def test_one_long_item_is_no_silence() -> None:
    """Nothing is finished for minutes. Ticks still give a line every 30 seconds, without an estimate that nobody has."""
    clock, lines = Clock(), list[str]()
    progress = Progress(lines.append, clock, interval=30.0)
    for _ in progress.track(["one"], "layers", 1):
        for _ in range(100):
            clock.now += 1.0
            progress.tick()
    assert lines == [f"layers 0 of 1: {seconds} s so far" for seconds in (30, 60, 90)]
    clock.now += 100.0
    progress.tick()
    assert len(lines) == 3  # nothing is under way any more


def test_a_loop_that_is_left_early_is_forgotten() -> None:
    clock, lines = Clock(), list[str]()
    progress = Progress(lines.append, clock, interval=30.0)
    for _ in progress.track(range(3), "layers", 3):
        for _ in progress.track(range(3), "steps", 3):
            break
        break
    clock.now = 100.0
    progress.tick()
    assert lines == []


def test_lines_come_from_a_thread_while_the_work_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ladimo")
    with reporting(Progress(interval=0.0)):
        for _ in track(range(1), "naps"):
            deadline = time.monotonic() + 30
            while not caplog.records and time.monotonic() < deadline:
                time.sleep(0.05)
    assert caplog.records[0].getMessage().startswith("naps 0 of 1: ")


def test_without_reporting_items_pass_through() -> None:
    assert list(track(iter("abc"), "letters")) == ["a", "b", "c"]


def test_a_conversion_says_where_it_is(made: Made, tmp_path: Path) -> None:
    lines: list[str] = []
    with reporting(Progress(lines.append, interval=0.0)):
        convert(str(made.dense), tmp_path / "moe", made.recipe.override({"train.steps": 20}), [made.text])
    assert any(re.fullmatch(r"layers 1 of 3 \(steps \d+ of 20\): \d+ s so far, about \d+ s left", line) for line in lines)
    stages = {line.partition(" ")[0] for line in lines}
    assert {"layers", "sequences"} <= stages
