"""The command for GPU machines, run dry: what nobody can try by hand before the machine is there has to work at once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loadtests import gpu_suite
from loadtests.gpu.bench import Bench
from loadtests.gpu_suite import LEAST_SECONDS, SECTIONS, run_all, run_here, run_section

ABSENT = ("fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings", "prometheus_client", "llguidance", "hypothesis")


@pytest.mark.parametrize("name", ["prefill", "swap", "counting", "batches"])
def test_section(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_section(name, tmp_path, capsys)


def check_section(name: str, out: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Run a section dry. It prints what it writes. Returns its results."""
    run_section(Bench(name, out, "tiny", dry=True), SECTIONS[name][0])
    record = json.loads((out / f"{name}.json").read_text())
    assert record["benchmark"] == f"gpu_suite {name}"
    assert record["dry_run"]
    assert "error" not in record
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    results: list[dict[str, Any]] = record["results"]
    assert results
    return results


def test_decode_says_how_far_from_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["policy"]: row for row in check_section("decode", tmp_path, capsys)}
    distinct = {name: row.get("distinct_experts") for name, row in rows.items()}
    assert [distinct[name] for name in ("all", "half", "quarter", "quarter fixed")] == [8, 4, 2, 2]
    assert rows["all"]["limit_to_all"] == rows["all"]["speed_to_all"] == 1
    assert 1 < rows["half"]["limit_to_all"] < rows["quarter"]["limit_to_all"]


def test_integers_need_fewer_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {(row["weights"], row["policy"]): row for row in check_section("integers", tmp_path, capsys)}
    assert [*rows] == [(weights, policy) for weights in ("as they are", "int8", "int4") for policy in ("all", "quarter")]
    assert {row["distinct_experts"] for (_, policy), row in rows.items() if policy == "quarter"} == {2}
    needed = {key: row["fraction_of_bandwidth"] * row["milliseconds"] for key, row in rows.items()}
    for policy in ("all", "quarter"):
        assert needed["as they are", policy] > 2 * needed["int8", policy] > 2 * needed["int4", policy]


def test_nested_weights_need_fewer_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {(row["batch"], row["policy"]): row for row in check_section("nested", tmp_path, capsys)}
    alone = ["dense", "whole", "8 bits", "4 bits", "refined"]
    assert [*rows] == [*((1, name) for name in alone), *((2, name) for name in [*alone, "8 and 4 bits"])]
    for batch in (1, 2):
        whole, at8, at4, refined = (rows[batch, name]["weight_bytes"] for name in ("whole", "8 bits", "4 bits", "refined"))
        assert whole > 1.8 * at8 > 2.8 * at4 and at4 < refined < at8
    assert rows[2, "8 and 4 bits"]["weight_bytes"] == rows[2, "8 bits"]["weight_bytes"]


def test_kernels_are_compiled_ahead(tmp_path: Path) -> None:
    """Once: a second run finds everything in the cache."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "loadtests.gpu.precompile", str(tmp_path / "cache")]
    command += ["--shape", "tiny", "--only", "dense", "--batches", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    sizes = []
    for _ in range(2):
        done = subprocess.run(command, cwd=gpu_suite.ROOT, env=environment, capture_output=True, text=True, check=True)
        assert "_matvec_kernel" in done.stdout and "_attend_part_kernel" in done.stdout
        sizes.append(len(list((tmp_path / "cache").rglob("*.cubin"))))
    assert sizes[0] == sizes[1] > 5
    command[command.index("dense")] = "sparse"
    bad = subprocess.run(command, cwd=gpu_suite.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert bad.returncode == 2 and "sparse" in bad.stderr


@pytest.mark.long
def test_needs_no_web_framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The section of tests, as where there are torch, transformers and pytest only: a JSON line for it, and one last."""
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in (*ABSENT, "pytest_asyncio"))
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{blocked}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    assert gpu_suite.main(["--dry-run", "--only", "tests", "--out", str(tmp_path / "out")]) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert [record["benchmark"] for record in records] == ["gpu_suite tests", "gpu_suite"]
    assert set(records[-1]["sections"]) == {"tests"}
    assert "test_replay_equals_eager" in (tmp_path / "out" / "tests.log").read_text()


def test_sections_of_one_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One fails, one sleeps past its limit, one is fine."""

    def fails() -> None:
        raise ValueError("no")

    sections = {"fails": fails, "hangs": lambda: time.sleep(60), "fine": lambda: print("fine")}
    outcome = run_here(sections, {"fails": 30, "hangs": LEAST_SECONDS, "fine": 30}, 60)
    said = [outcome[name].split(" (")[0] for name in sections]
    assert said == [
        "failed: ValueError: no",
        "failed: OutOfTime: out of time",
        "ok",
    ]
    assert run_here({"late": fails}, {"late": 30}, LEAST_SECONDS / 2) == {"late": "skipped: no time left"}
    capfd.readouterr()
    assert gpu_suite.main(["--dry-run", "--one-process", "--only", "swap", "--out", str(tmp_path)]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["sections"].keys() == {"swap"}


def test_a_section_that_fails_or_hangs_loses_nothing_else() -> None:
    """Processes are stood in for by small ones: one dies, one sleeps past its limit, one is fine, and one has no time left."""
    programs = {
        "dies": "import os; os.abort()",
        "hangs": "import time; time.sleep(600)",
        "fine": "pass",
        "late": "pass",
    }
    commands = {name: [sys.executable, "-c", program] for name, program in programs.items()}
    outcome = run_all(commands, {"dies": 50, "hangs": 1, "fine": 50, "late": 0.5}, seconds=60, least=1)
    assert outcome["dies"].startswith("failed with -6")
    assert outcome["hangs"].startswith("stopped after 1 s")
    assert outcome["fine"].startswith("ok")
    assert outcome["late"] == "skipped: no time left"


def test_what_a_failed_section_had_measured_is_kept(tmp_path: Path) -> None:
    def broken(bench: Bench) -> None:
        bench.row(policy="all", milliseconds=1.0)
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError):
        run_section(Bench("decode", tmp_path, "tiny", dry=True), broken)
    record = json.loads((tmp_path / "decode.json").read_text())
    assert record["results"] == [{"policy": "all", "milliseconds": 1.0}]
    assert record["error"] == "RuntimeError: the device is gone"


def test_bad_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--dry-run", "--only", "decode,nothing", "--out", str(tmp_path)])
    assert "there is no section 'nothing'" in capsys.readouterr().err
