"""Kills at many moments of one conversion, full disks and forbidden places: a clear error, nothing half-written, and the next
run gives what an undisturbed one gives."""

import subprocess
import sys
from pathlib import Path

import pytest

from ladimo.cli import main
from ladimo.convert.pipeline import convert
from tests.ladimo.convert.conftest import Made
from tests.ladimo.convert.test_pipeline import results

# Each run is a fork, so that the interpreter starts once. A run is killed when it is about to touch the file system under OUT
# for the n-th time: between any two of these moments nothing changes on disk but the file being written.
KILLER = """
import os, random, signal, sys
import torch._dynamo  # an optimizer imports it; so it is imported once and not by every run
from ladimo import cli

here, arguments = sys.argv[1], sys.argv[2:]
TOUCHES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")

def run(kill_at):
    child = os.fork()
    if child == 0:
        touches = 0
        def hook(event, details):
            nonlocal touches
            if event in TOUCHES and str(details[0]).startswith(here):
                touches += 1
                if touches == kill_at:
                    os.write(1, f"{event} {details[0]}\\n".encode())
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        os._exit(cli.main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

moments = random.Random(int(os.environ["KILLS_SEED"]))
for _ in range(14):
    code = run(moments.randint(1, 70))
    if code != -signal.SIGKILL:
        sys.exit(code)
sys.exit(run(0))
"""


def recipe_flags(made: Made, path: Path) -> list[str]:
    """The command line that gives `made`."""
    train = made.recipe.train
    path.write_text(
        f"method = 'ladimo'\ntokens = {made.recipe.tokens}\nlayers = 'all'\n[split]\nexperts = 4\n"
        f"[train]\nsteps = {train.steps}\n"
        f"batch_tokens = {train.batch_tokens}\nexpert_lr = {train.expert_lr}\ngate_lr = {train.gate_lr}\n"
    )
    return ["--text", str(made.text), "--recipe", str(path)]


@pytest.mark.long
def test_kills_at_random_moments_change_nothing(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out/moe"
    monkeypatch.setenv("KILLS_SEED", "3")
    arguments = ["convert", str(made.dense), str(out), *recipe_flags(made, tmp_path / "recipe.toml")]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(out), *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    killed = [line for line in done.stdout.splitlines() if line.startswith(("open", "os."))]
    assert len(killed) >= 8, "too few kills to say anything"
    assert len(set(killed)) >= 6, "kills all at one place"
    assert results(out) == results(made.out)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["arguments.json", "calibration.json", "policies.json"])
def test_a_full_disk_is_one_line_and_the_next_run_finishes(
    made: Made, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel itself says that there is no space, at a file of one stage or another."""
    out = tmp_path / "moe"
    victim = tmp_path / "moe.partial" / name
    partial = victim.with_name(f".{victim.name}.partial")
    command = ["convert", str(made.dense), str(out), *recipe_flags(made, tmp_path / "recipe.toml")]
    partial.parent.mkdir()
    partial.symlink_to("/dev/full")
    assert main(command) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"ladimo: error: [Errno 28] No space left on device: '{victim}'"
    assert not victim.exists()
    assert not partial.exists()
    assert not out.exists()
    assert convert(str(made.dense), out, made.recipe, [made.text])
    assert results(out) == results(made.out)


def test_a_place_that_may_not_be_written_is_one_line(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may write anywhere, so the refusal is made up: every new directory under it is forbidden."""
    out = tmp_path / "closed/moe"
    out.parent.mkdir()
    mkdir = Path.mkdir

    def forbidden(path: Path, *arguments: object, **options: object) -> None:
        if path.parent == out.parent:
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", forbidden)
    assert main(["convert", str(made.dense), str(out), *recipe_flags(made, tmp_path / "recipe.toml")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"ladimo: error: [Errno 13] Permission denied: '{out}.partial'"
    assert list(out.parent.iterdir()) == []
