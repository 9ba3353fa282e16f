"""Where the compiled step comes from: shipped with the package, the user's cache, or a directory of last resort."""

import ctypes
import dataclasses
import os
import platform
import shutil
import stat
import threading
import time
from pathlib import Path

import pytest

from ladimo.model.cpu import build
from ladimo.model.cpu.__main__ import main
from ladimo.model.cpu.cache import cache_directories, make_private

pytestmark = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="there is no C compiler here")
VARIANTS = build.VARIANTS.get(platform.machine(), ())


@pytest.fixture
def code(tmp_path: Path) -> build.Code:
    """Code that takes no time to compile."""
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "step.c").write_text("int one(void) { return 1; }")
    return build.Code(directory)


@pytest.mark.skipif(not VARIANTS, reason="nothing is shipped for this machine")
def test_every_shipped_variant_is_found_by_the_processors_that_can_run_it(tmp_path: Path, code: build.Code) -> None:
    shipped = tmp_path / "shipped"
    paths = build.compile_variants(shipped, code)
    assert sorted(shipped.iterdir()) == sorted(paths)
    for variant, path in zip(VARIANTS, paths, strict=True):
        assert build.shipped_variant(shipped, variant.needs | {"something_new"}, code) == (variant, path)
    assert build.shipped_variant(shipped, frozenset(), code) is None
    found = build.shipped_variant(shipped, code=code)
    assert found is not None, "this processor runs none of them"
    assert ctypes.CDLL(str(found[1])).one() == 1


@pytest.mark.skipif(not VARIANTS, reason="nothing is shipped for this machine")
def test_what_was_shipped_from_another_source_is_not_loaded(tmp_path: Path, code: build.Code) -> None:
    build.compile_variants(tmp_path / "shipped", code)
    assert build.shipped_variant(tmp_path / "shipped", code=code)
    (code.directory / "step.c").write_text("int one(void) { return 2; }")
    assert build.shipped_variant(tmp_path / "shipped", code=code) is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
def test_the_step_itself_compiles_for_a_kind_of_processor(tmp_path: Path) -> None:
    """The smallest one; the others' vectors are those of the tests of the step. Not optimised, which takes much longer. What
    was shipped is loaded where there is no compiler."""
    code = build.Code(flags=(*build.COMMON_FLAGS, "-O0"))
    build.compile_variants(tmp_path, code, VARIANTS[-1:])
    library, origin = build.load_somewhere(dataclasses.replace(code, compilers=()), tmp_path, [])
    assert library.ladimo_step
    assert "compiled for x86-64-v2" in origin


def test_the_command_says_why_it_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "file")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
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


def test_a_directory_that_cannot_be_used_is_passed_over_with_a_line(
    tmp_path: Path, code: build.Code, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    unusable = [tmp_path / "file/ladimo", tmp_path / "open"]
    library, origin = build.load_somewhere(code, tmp_path, [*unusable, tmp_path / "good"])
    assert library.one() == 1
    assert str(tmp_path / "good") in origin
    (record,) = caplog.records
    assert str(tmp_path / "good") in record.message
    assert all(str(each) in record.message for each in unusable)
    with pytest.raises(build.BuildError, match="open: cannot be used"):
        build.load_somewhere(code, tmp_path, unusable)
    with pytest.raises(build.BuildError, match="no directory"):
        build.load_somewhere(code, tmp_path, [])


def test_a_compilation_can_be_abandoned_and_leaves_nothing(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\n[ $1 = --version ] && exit\nsleep 600 & wait\n")
    slow.chmod(0o700)
    code = build.Code(compilers=(str(slow),))
    errors: list[BaseException] = []

    def compile_it() -> None:
        try:
            build.compiled(tmp_path / "cache", code=code)
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


def test_what_a_killed_process_left_is_removed(tmp_path: Path, code: build.Code) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    old, new = tmp_path / "cache/partial-old.so", tmp_path / "cache/partial-new.so"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    made = build.compiled(tmp_path / "cache", code=code)
    assert sorted((tmp_path / "cache").iterdir()) == sorted([new, made])
