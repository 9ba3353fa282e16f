"""Where the compiled step comes from: shipped with the package, the user's cache, or a directory of last resort."""

import ctypes
import os
import platform
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ladimo.model.cpu import build
from ladimo.model.cpu.cache import cache_directories, make_private

pytestmark = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="there is no C compiler here")
VARIANTS = build.VARIANTS.get(platform.machine(), ())


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that takes no time to compile."""
    path = tmp_path / "sources" / "step.c"
    path.parent.mkdir()
    path.write_text("int one(void) { return 1; }")
    monkeypatch.setattr(build, "SOURCES", path.parent)
    return path


@pytest.mark.skipif(not VARIANTS, reason="nothing is shipped for this machine")
@pytest.mark.usefixtures("source")
def test_every_shipped_variant_is_found_by_the_processors_that_can_run_it(tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    paths = build.compile_variants(shipped)
    assert sorted(shipped.iterdir()) == sorted(paths)
    for variant, path in zip(VARIANTS, paths, strict=True):
        assert build.shipped_variant(shipped, variant.needs | {"something_new"}) == (variant, path)
    assert build.shipped_variant(shipped, frozenset()) is None
    found = build.shipped_variant(shipped)
    assert found is not None, "this processor runs none of them"
    assert ctypes.CDLL(str(found[1])).one() == 1


@pytest.mark.skipif(not VARIANTS, reason="nothing is shipped for this machine")
def test_what_was_shipped_from_another_source_is_not_loaded(tmp_path: Path, source: Path) -> None:
    build.compile_variants(tmp_path / "shipped")
    source.write_text("int one(void) { return 2; }")
    assert build.shipped_variant(tmp_path / "shipped") is None


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
def test_the_step_itself_compiles_for_a_kind_of_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest one; the others' vectors are those of the tests of the step. Loaded where there is no compiler."""
    monkeypatch.setattr(build, "VARIANTS", {"x86_64": VARIANTS[-1:]})
    monkeypatch.setattr(build, "SHIPPED", tmp_path)
    build.compile_variants(tmp_path)
    monkeypatch.setattr(build, "which", lambda name: None)
    build._find.cache_clear()
    try:
        library = build.library()
        assert library is not None
        assert library.ladimo_step
        assert "compiled for x86-64-v2" in build.origin()
    finally:
        build._find.cache_clear()


def test_the_command_says_why_it_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "ladimo.model.cpu", "--out", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ladimo: ")
    assert "cannot be written" in line


def test_the_users_cache_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    temporary = tmp_path / f"tmp/ladimo-{os.getuid()}"
    assert cache_directories() == [tmp_path / "cache/ladimo", tmp_path / "home/.cache/ladimo", temporary]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directories() == [tmp_path / "home/.cache/ladimo", temporary]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a user whom the system does not know
    assert cache_directories() == [temporary]


def test_code_is_not_loaded_from_where_others_can_write(tmp_path: Path) -> None:
    make_private(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    make_private(tmp_path / "new")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError):
        make_private(tmp_path / "open")
    if os.getuid() == 0:
        (tmp_path / "foreign").mkdir(mode=0o700)
        os.chown(tmp_path / "foreign", 12345, 12345)
        with pytest.raises(PermissionError):
            make_private(tmp_path / "foreign")


@pytest.mark.usefixtures("source")
def test_a_directory_that_cannot_be_used_is_passed_over_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    unusable = [tmp_path / "file/ladimo", tmp_path / "open"]
    code, path = build._compile_somewhere([*unusable, tmp_path / "good"])
    assert code.one() == 1
    assert path.parent == tmp_path / "good"
    (record,) = caplog.records
    assert str(tmp_path / "good") in record.message
    assert all(str(each) in record.message for each in unusable)
    with pytest.raises(build.BuildError, match="open: cannot be used"):
        build._compile_somewhere(unusable)
    with pytest.raises(build.BuildError, match="no directory"):
        build._compile_somewhere([])


def test_a_compilation_can_be_abandoned_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\n[ $1 = --version ] && exit\nsleep 600 & wait\n")
    slow.chmod(0o700)
    monkeypatch.setattr(build, "which", lambda name: str(slow))
    errors: list[BaseException] = []

    def compile_it() -> None:
        try:
            build.compiled(tmp_path / "cache")
        except build.BuildError as error:
            errors.append(error)

    thread = threading.Thread(target=compile_it)
    thread.start()
    while not (tmp_path / "cache").is_dir() or not list((tmp_path / "cache").iterdir()) or not build._running:
        time.sleep(0.01)
    build.abandon()
    assert list((tmp_path / "cache").iterdir()) == []
    thread.join(10)
    assert len(errors) == 1


@pytest.mark.usefixtures("source")
def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    old, new = tmp_path / "cache/partial-old.so", tmp_path / "cache/partial-new.so"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    made = build.compiled(tmp_path / "cache")
    assert sorted((tmp_path / "cache").iterdir()) == sorted([new, made])
