"""Layers as tasks of a Ray cluster: the same checkpoint, also when workers die; and errors as without Ray."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ladimo.cli
from ladimo.convert.jobs.parallel import cpu_threads
from ladimo.convert.jobs.ray_jobs import RETRIES, run_jobs_on_ray
from ladimo.convert.pipeline import convert
from tests.ladimo.convert.conftest import small_recipe
from tests.ladimo.convert.jobs.jobs import die_once, fail, kill_itself, logger, square

on_a_cluster = pytest.mark.long  # each test starts one, which takes seconds


def test_without_ray_it_says_what_to_install(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    flags = ["--text", str(text), "--tokens", "2000", "--method", "static", "--ray", "auto"]
    assert ladimo.cli.main(["convert", str(source), str(tmp_path / "out"), *flags]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("--ray needs Ray: pip install 'ladimo[ray]'")
    assert not (tmp_path / "out").exists()


@on_a_cluster
def test_results_and_log_lines_arrive(caplog: pytest.LogCaptureFixture) -> None:
    """Items may be large: no more of them are out than there are tasks. Each has one thread."""
    caplog.set_level("INFO", logger="ladimo")
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(6):
            taken.append(number)
            yield number

    results = {}
    for item, result in run_jobs_on_ray(square, items(), "local", jobs=2):
        results[item] = result[:2]
        assert len(taken) < len(results) + 2
    assert results == {number: (number * number, 1) for number in range(6)}
    lines = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert sorted(lines) == [f"squaring {number}" for number in range(6)]


@on_a_cluster
def test_a_failure_is_the_task_s_own_error() -> None:
    with pytest.raises(ValueError, match=r"^layer [34] is no good\n"):
        list(run_jobs_on_ray(fail, [3, 4], "local", jobs=2))


@on_a_cluster
def test_a_worker_that_dies_is_replaced_and_one_that_always_dies_is_one_clear_error(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a", "b")]
    assert dict(run_jobs_on_ray(die_once, places, "local")) == {place: place.name for place in places}
    with pytest.raises(ChildProcessError, match=f"gave to 7 died {RETRIES + 1} times"):
        list(run_jobs_on_ray(kill_itself, [7], "local"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:many"])
def test_no_cluster_is_one_clear_error(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=f"^--ray {address}: "):
        list(run_jobs_on_ray(square, [1], address))


@on_a_cluster
def test_a_conversion_is_that_of_one_process(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, where every layer gets one thread. Workers have another working directory than a relative OUT needs."""
    with cpu_threads(1):
        assert convert(str(source), tmp_path / "alone", small_recipe(), [text])
    monkeypatch.chdir(tmp_path)
    assert convert(str(source), Path("ray"), small_recipe(), [text], jobs=None, ray="local")
    assert Path("ray/model.safetensors").read_bytes() == Path("alone/model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "ray"]
