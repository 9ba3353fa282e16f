"""Compiles the C code of the CPU step, and loads it.

The C files beside this one are compiled for this machine's processor when they are first needed, and kept for later. A
container image has no compiler. So it contains a compiled file for each of `VARIANTS`, made by `python -m ladimo.model.cpu`.
The best one that the processor can run is loaded.
"""

import ctypes
import hashlib
import logging
import os
import platform
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import which

from ladimo.model.cpu.cache import cache_directories, make_private
from ladimo.model.nested import STEPS
from ladimo.model.rule import RuleNumber

SOURCES = Path(__file__).parent
SHIPPED = Path(__file__).with_name("compiled")
# No -ffast-math: the results of a token must not depend on its batch, and that needs a fixed order of sums.
OPTIONS = ("-O3", "-std=gnu17", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-Wno-psabi")
# The columns of a policy's row, and the steps of nested weights, so that the C code uses the same definitions as Python.
RULE_MACROS = (f"-DRULE_NUMBERS={len(RuleNumber)}", *(f"-DRULE_{number.name}={number.value}" for number in RuleNumber))
MACROS = (*RULE_MACROS, f"-DNESTED_STEPS={STEPS}")
COMMON_FLAGS = (*OPTIONS, *MACROS)
FLAGS = (*COMMON_FLAGS, "-march=native")
COMPILERS = ("gcc", "cc", "clang")
TIMEOUT_SECONDS = 120
ABANDON_SECONDS = 2

log = logging.getLogger(__name__)


class BuildError(Exception):
    """There is no compiled step on this machine. The message says why."""


class PlaceError(BuildError):
    """The step cannot be stored in or loaded from one directory. Another directory may work."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A kind of processor: flags for the compiler, and features that /proc/cpuinfo must list (`needs`)."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_V2 = frozenset({"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"})
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
# By architecture, best first. Names are the levels of the x86-64 psABI, and the features used beyond them.
VARIANTS = {
    "x86_64": (
        Variant(
            "x86-64-v4-bf16",
            ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
            _V4 | {"avx512_vnni", "avx512_bf16"},
        ),
        Variant("x86-64-v4-vnni", ("-march=x86-64-v4", "-mavx512vnni"), _V4 | {"avx512_vnni"}),
        Variant("x86-64-v4", ("-march=x86-64-v4",), _V4),
        Variant("x86-64-v3", ("-march=x86-64-v3",), _V3),
        Variant("x86-64-v2", ("-march=x86-64-v2",), _V2),
    ),
    "aarch64": (Variant("armv8-a", ("-march=armv8-a",), frozenset({"asimd"})),),
}


def library() -> ctypes.CDLL | None:
    """The compiled step, loaded; None if there is none. `origin` then says why."""
    found = _find()
    return None if isinstance(found, str) else found[0]


def origin() -> str:
    """A description of the step that `library` returns, with its file; or the reason why there is none."""
    found = _find()
    return found if isinstance(found, str) else found[1]


@cache
def _find() -> tuple[ctypes.CDLL, str] | str:
    try:
        shipped = shipped_variant(SHIPPED)
        if shipped is not None:
            variant, path = shipped
            return _load(path), f"compiled for {variant.name}, {path}"
        code, path = _compile_somewhere(cache_directories())
        return code, f"compiled for this processor, {path}"
    except BuildError as error:
        return str(error)


def shipped_variant(directory: Path, features: frozenset[str] | None = None) -> tuple[Variant, Path] | None:
    """The best variant in `directory` that a processor with these features can run. `features` None: this processor's.

    None if there is no such variant.
    """
    features = _features() if features is None else features
    for variant in VARIANTS.get(platform.machine(), ()):
        path = variant_path(directory, variant)
        if variant.needs <= features and path.exists():
            return variant, path
    return None


def variant_path(directory: Path, variant: Variant) -> Path:
    """The file of a compiled variant. Its name has a hash of the source, so a file from other sources is never loaded."""
    return directory / f"step-{variant.name}-{_hash(_source(), *COMMON_FLAGS, *variant.flags)}.so"


def compile_variants(directory: Path) -> list[Path]:
    """Compile the step for every kind of processor of this architecture. Returns the files. Raises BuildError."""
    compiler, paths = _compiler(), []
    for variant in VARIANTS.get(platform.machine(), ()):
        target = variant_path(directory, variant)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _compile(compiler, (*COMMON_FLAGS, *variant.flags), target)
        except OSError as error:
            raise BuildError(f"{directory}: cannot be written ({error.strerror})") from error
        target.chmod(0o755)
        paths.append(target)
    return paths


def compiled(directory: Path, flags: Sequence[str] = FLAGS) -> Path:
    """The shared library in `directory`. It is compiled if it is not there yet. Raises BuildError.

    The file name has a hash of the source, the flags, the compiler and the processor's features, because different machines may
    share one home directory.
    """
    compiler = _compiler()
    version = _run([compiler, "--version"])
    made_of = (_source(), *flags, compiler, version, platform.machine(), *sorted(_features()))
    target = directory / f"step-{_hash(*made_of)}.so"
    try:
        make_private(directory)
        if not target.exists():
            _compile(compiler, flags, target)
    except OSError as error:
        raise PlaceError(f"{directory}: cannot be used ({error.strerror})") from error
    return target


def abandon() -> None:
    """Stop a running compilation, so that the process can end and leaves no files behind. Its caller gets BuildError."""
    for process in tuple(_running):
        _end(process)
    if _compiling.acquire(timeout=ABANDON_SECONDS):  # the compilation holds it until its partial file is removed
        _compiling.release()


_compiling = threading.Lock()
_running: set["subprocess.Popen[str]"] = set()


def _compile_somewhere(directories: Sequence[Path]) -> tuple[ctypes.CDLL, Path]:
    """Compile and load the step in the first directory that allows both. Raises BuildError."""
    refused = ["there is no directory to compile it to"] if not directories else []
    for directory in directories:
        try:
            path = compiled(directory)
            code = _load(path)
        except PlaceError as error:
            refused.append(str(error))
            continue
        if refused:
            log.warning("compiled code goes to %s: %s", directory, "; ".join(refused))
        return code, path
    raise BuildError("; ".join(refused))


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # for example, the file system forbids execution
        raise PlaceError(f"{path}: cannot be loaded ({error})") from error


def _compile(compiler: str, flags: Sequence[str], target: Path) -> None:
    """Compile to another name, then move the file, so that other processes never see a partial file. Raises BuildError,
    OSError."""
    with _compiling:
        _remove_leftovers(target.parent)
        handle, partial = tempfile.mkstemp(prefix="partial-", suffix=".so", dir=target.parent)
        os.close(handle)
        try:
            _run([compiler, *flags, *(str(path) for path in _files(".c")), "-o", partial, "-lm"])
            Path(partial).replace(target)
        finally:
            Path(partial).unlink(missing_ok=True)


def _remove_leftovers(directory: Path) -> None:
    """Remove partial files of processes that were killed while they compiled."""
    for path in directory.glob("partial-*.so"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > 2 * TIMEOUT_SECONDS:
                path.unlink()


def _run(command: list[str]) -> str:
    """Run a command and return what it prints. Raises BuildError."""
    pipe = subprocess.PIPE
    try:
        # In its own session, because the compiler starts other programs, and all of them must be ended together.
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
            _running.add(process)
            try:
                output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
            finally:
                _running.discard(process)
                _end(process)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if process.returncode:
        first = next((line for line in errors.splitlines() if "error" in line), errors.strip()[:200])
        raise BuildError(f"{command[0]} failed: {first}")
    return output


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


def _compiler() -> str:
    found = next((path for name in COMPILERS if (path := which(name))), None)
    if found is None:
        raise BuildError(f"there is no C compiler ({', '.join(COMPILERS)})")
    return found


def _files(*suffixes: str) -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in suffixes)


def _source() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in _files(".c", ".h"))


def _hash(*parts: str) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _features() -> frozenset[str]:
    """The processor's features from /proc/cpuinfo; empty if the system has no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    listed = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(listed.partition(":")[2].split())
