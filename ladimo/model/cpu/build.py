"""Compiling `step.c` for the machine at hand, once, and loading it."""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from shutil import which

from ladimo.model.rule import RuleNumber

SOURCE = Path(__file__).with_name("step.c")
# No -ffast-math: the order of sums is what makes a token's numbers independent of its neighbours.
FLAGS = ("-O3", "-march=native", "-std=gnu17", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-Wno-psabi")
# The layout of a policy's row: the C code reads the same definition as Python.
MACROS = (f"-DRULE_NUMBERS={len(RuleNumber)}", *(f"-DRULE_{number.name}={number.value}" for number in RuleNumber))
COMPILERS = ("gcc", "cc", "clang")
TIMEOUT_SECONDS = 120

log = logging.getLogger(__name__)


class BuildError(Exception):
    """The kernel cannot be had here; the message says why."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with one line in the log, where it cannot be had."""
    try:
        return ctypes.CDLL(str(compiled(cache_directory())))
    except (BuildError, OSError) as error:
        log.warning("no compiled CPU kernel, torch computes instead: %s", error)
        return None


def cache_directory() -> Path:
    return Path.home() / ".cache" / "ladimo"


def compiled(directory: Path) -> Path:
    """The shared library in `directory`, compiled if it is not there yet. Raises BuildError.

    Its name says what it was made of: source, flags, macros, compiler and the processor's abilities (a home directory may be
    shared by machines that differ).
    """
    compiler = next((path for name in COMPILERS if (path := which(name))), None)
    if compiler is None:
        raise BuildError(f"there is no C compiler ({', '.join(COMPILERS)})")
    version = _run([compiler, "--version"])
    made_of = [SOURCE.read_text(encoding="utf-8"), *FLAGS, *MACROS, compiler, version, platform.machine(), _processor()]
    target = directory / f"step-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Compiled under another name and moved: a second process finds all of it or nothing.
        handle, partial = tempfile.mkstemp(suffix=".so", dir=directory)
    except OSError as error:
        raise BuildError(f"{directory}: cannot be written ({error.strerror})") from error
    os.close(handle)
    try:
        _run([compiler, *FLAGS, *MACROS, str(SOURCE), "-o", partial, "-lm"])
        Path(partial).replace(target)
    finally:
        Path(partial).unlink(missing_ok=True)
    return target


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise BuildError(f"{command[0]} failed: {first}")
    return done.stdout


def _processor() -> str:
    """The instruction sets of the processor, as the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
