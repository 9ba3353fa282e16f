"""The command for GPU machines, run dry: what nobody can try by hand before the machine is there has to work at once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests import gpu_suite
from loadtests.gpu_suite import ROOT, SECTIONS, run_all, run_section

ABSENT = ("fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings", "prometheus_client", "llguidance", "hypothesis")


@pytest.mark.parametrize("name", ["decode", "integers", "prefill", "swap", "counting", "batches"])
def test_section(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_section(name, tmp_path, "tiny", dry=True) == 0
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["benchmark"] == f"gpu_suite {name}"
    assert record["dry_run"]
    assert record["results"]
    assert "error" not in record
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record


def test_decode_says_how_far_from_the_limit(tmp_path: Path) -> None:
    run_section("decode", tmp_path, "tiny", dry=True)
    rows = {row["policy"]: row for row in json.loads((tmp_path / "decode.json").read_text())["results"]}
    distinct = {name: row.get("distinct_experts") for name, row in rows.items()}
    assert [distinct[name] for name in ("all", "half", "quarter", "quarter fixed")] == [8, 4, 2, 2]
    assert rows["all"]["limit_to_all"] == rows["all"]["speed_to_all"] == 1
    assert 1 < rows["half"]["limit_to_all"] < rows["quarter"]["limit_to_all"]


def test_integers_need_fewer_bytes(tmp_path: Path) -> None:
    run_section("integers", tmp_path, "tiny", dry=True)
    record = json.loads((tmp_path / "integers.json").read_text())
    rows = {(row["weights"], row["policy"]): row for row in record["results"]}
    assert [*rows] == [(weights, policy) for weights in ("as they are", "int8", "int4") for policy in ("all", "quarter")]
    assert {row["distinct_experts"] for (_, policy), row in rows.items() if policy == "quarter"} == {2}
    needed = {key: row["fraction_of_bandwidth"] * row["milliseconds"] for key, row in rows.items()}
    for policy in ("all", "quarter"):
        assert needed["as they are", policy] > 2 * needed["int8", policy] > 2 * needed["int4", policy]


@pytest.mark.slow
def test_needs_no_web_framework(tmp_path: Path) -> None:
    """The whole command, as where there are torch, transformers and pytest only: a JSON line per section, and one last."""
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in (*ABSENT, "pytest_asyncio"))
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{blocked}\n")
    command = [sys.executable, "-m", "loadtests.gpu_suite", "--dry-run", "--only", "tests", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [record["benchmark"] for record in records] == ["gpu_suite tests", "gpu_suite"]
    assert set(records[-1]["sections"]) == {"tests"}
    assert "test_replay_equals_eager" in (tmp_path / "out" / "tests.log").read_text()


def test_a_section_that_fails_or_hangs_loses_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are stood in for by small ones: one dies, one sleeps past its limit, one is fine."""
    programs = {
        "decode": "import os; os.abort()",
        "prefill": "import time; time.sleep(600)",
        "swap": "pass",
    }
    start = subprocess.Popen

    def popen(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        return start([sys.executable, "-c", programs[command[command.index("--section") + 1]]], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(gpu_suite, "LEAST_SECONDS", 1)
    monkeypatch.setitem(SECTIONS, "prefill", (SECTIONS["prefill"][0], 1))
    outcome = run_all(["decode", "prefill", "swap"], tmp_path, "tiny", dry=False, seconds=60)
    assert outcome["decode"].startswith("failed with -6")
    assert outcome["prefill"].startswith("stopped after 1 s")
    assert outcome["swap"].startswith("ok")


def test_what_a_failed_section_had_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: gpu_suite.Bench) -> None:
        bench.row(policy="all", milliseconds=1.0)
        raise RuntimeError("the device is gone")

    monkeypatch.setitem(SECTIONS, "decode", (broken, 10))
    with pytest.raises(RuntimeError):
        run_section("decode", tmp_path, "tiny", dry=True)
    record = json.loads((tmp_path / "decode.json").read_text())
    assert record["results"] == [{"policy": "all", "milliseconds": 1.0}]
    assert record["error"] == "RuntimeError: the device is gone"


def test_limits_fit_into_eight_minutes() -> None:
    """Sections rarely take their limit; the last ones get what is left."""
    assert sum(limit for _, limit in list(SECTIONS.values())[:6]) <= 425


def test_bad_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--dry-run", "--only", "decode,nothing", "--out", str(tmp_path)])
    assert "there is no section 'nothing'" in capsys.readouterr().err
