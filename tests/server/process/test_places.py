"""The directories that a server writes to: its own, or refused at the start."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ladimo.model.cpu import build
from server.__main__ import main
from server.launch import given_name
from server.policies.directory import LOCK_FILE, held
from tests.server.process.test_ends import start

ROOT = Path(__file__).parents[3]
NOBODY = 12345  # a user without entry in the list of users
HOLD = "import sys, time\nfrom pathlib import Path\nfrom server.policies.directory import held\n" + (
    "with held(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(float(sys.argv[2]))\n"
)
# It may read what only root may, because Python itself can lie in root's home directory; it can write no more than others.
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
AS_NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]

# The command after it sees a root file system that nobody can write to, except for the directory that $1 names.
READ_ONLY = ["unshare", "--mount", "sh", "-ec", 'mount --bind "$1" "$1"; mount -o remount,ro,bind /; shift; exec "$@"', "sh"]


def can_become_another_user() -> bool:
    return shutil.which("setpriv") is not None and not subprocess.run([*AS_NOBODY, "true"], capture_output=True).returncode


other_users = pytest.mark.skipif(not can_become_another_user(), reason="no right to start a process as another user")


def can_have_a_read_only_root() -> bool:
    with tempfile.TemporaryDirectory() as name:
        writable, other = Path(name) / "writable", Path(name) / "other"
        writable.mkdir()
        command = [*READ_ONLY, str(writable), "sh", "-c", f"touch {writable}/file; touch {other}"]
        return (
            shutil.which("unshare") is not None
            and subprocess.run(command, capture_output=True).returncode != 0
            and (writable / "file").exists()
        )


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def refusal(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["no-such-model", "--port", "0", "--policies-dir", str(directory)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ladimo-server: --policies-dir {directory}: ")
    return line


def test_a_policies_directory_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "it is a file" in refusal(tmp_path / "file", capsys)
    assert "Not a directory" in refusal(tmp_path / "file/below", capsys)


@other_users
def test_a_policies_directory_that_cannot_be_written_is_refused(public: Path) -> None:
    (public / LOCK_FILE).touch()
    (public / LOCK_FILE).chmod(0o666)
    command = [*AS_NOBODY, sys.executable, "-c", HOLD, str(public), "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "cannot be written (Permission denied)" in done.stderr


def test_a_policies_directory_serves_one_server_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start("-c", HOLD, str(tmp_path / "new/state"), "600")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert "another server uses it" in refusal(tmp_path / "new/state", capsys)
    process.kill()  # without a chance to clean up
    process.communicate()
    with held(tmp_path / "new/state"), held(None):
        pass
    with held(tmp_path / "new/state"):
        pass


@pytest.mark.long
@other_users
@pytest.mark.skipif(not can_have_a_read_only_root(), reason="no right to mount")
@pytest.mark.skipif(build.library() is None, reason="there is no compiled CPU kernel here")
def test_a_user_whom_the_system_does_not_know_serves_where_only_temporary_files_can_be_written(
    moe_dir: Path, public: Path
) -> None:
    """As in a container that runs under a number: no home directory, no name, and a root file system that is read-only."""
    shutil.copytree(moe_dir, public / "model")
    temporary = public / "tmp"
    cache = temporary / "cache" / "ladimo"
    shutil.copytree(Path(build.origin().split(", ")[-1]).parent, cache)  # so that nothing has to be compiled
    for path in (temporary, *temporary.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    for path in (public / "model", *(public / "model").rglob("*")):
        path.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(temporary), "XDG_CACHE_HOME": str(temporary / "cache")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LADIMO_MODEL": str(public / "model"), "LADIMO_PORT": "0"}
    command = [*READ_ONLY, str(temporary), *AS_NOBODY, sys.executable, "-m", "server", "--device", "cpu"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=public, env=environment) as process:
        assert process.stdout is not None
        ready = any(line.strip().startswith("page") for line in process.stdout)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert ready, errors
    assert process.returncode == 0
    assert f"the compiled step computes on this CPU: compiled for this processor, {cache}" in errors


def test_a_model_has_the_name_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v7").mkdir()
    (tmp_path / "prod").symlink_to("v7")
    monkeypatch.chdir(tmp_path / "v7")
    assert given_name(str(tmp_path / "prod")) == given_name(f"{tmp_path}/prod/") == given_name("../prod") == "prod"
    assert given_name(".") == given_name("../v7/.") == "v7"
    assert given_name("someone/model-1b") == "model-1b"
