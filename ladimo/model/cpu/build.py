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
from ladimo.model.nested.weights import STEPS
from ladimo.model.precision import REFINED_GROUPS
from ladimo.model.rule import RuleNumber

SHIPPED = Path(__file__).with_name("compiled")
# No -ffast-math: the results of a token must not depend on its batch, and that needs a fixed order of sums.
OPTIONS = ("-O3", "-std=gnu17", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-Wno-psabi")
# The columns of a policy's row, and the steps of nested weights, so that the C code uses the same definitions as Python.
RULE_MACROS = (f"-DRULE_NUMBERS={len(RuleNumber)}", *(f"-DRULE_{number.name}={number.value}" for number in RuleNumber))
MACROS = (*RULE_MACROS, f"-DNESTED_STEPS={STEPS}", f"-DREFINED_GROUPS={REFINED_GROUPS}")
COMMON_FLAGS = (*OPTIONS, *MACROS)
NATIVE = "-march=native"
COMPILERS = ("gcc", "cc", "clang")
TIMEOUT_SECONDS = 120
ABANDON_SECONDS = 2

log = logging.getLogger(__name__)


class BuildError(Exception):
    """There is no compiled step on this machine. The message says why."""


class PlaceError(BuildError):
    """The step cannot be stored in or loaded from one directory. Another directory may work."""


@dataclass(frozen=True, slots=True)
class Code:
    """C code: all .c and .h files of a directory, the flags for every build of it, and the compilers to look for."""

    directory: Path = Path(__file__).parent
    flags: tuple[str, ...] = COMMON_FLAGS
    compilers: tuple[str, ...] = COMPILERS

    def files(self, *suffixes: str) -> list[Path]:
        return sorted(path for path in self.directory.iterdir() if path.suffix in suffixes)

    def hash(self, *parts: str) -> str:
        """A hash of the source, the flags, and other things that decide what a build is."""
        source = "".join(path.read_text(encoding="utf-8") for path in self.files(".c", ".h"))
        return hashlib.sha256(repr((source, *self.flags, *parts)).encode()).hexdigest()[:16]

    def compiler(self) -> str:
        """Raises BuildError if there is none."""
        found = next((path for name in self.compilers if (path := which(name))), None)
        if found is None:
            raise BuildError(f"there is no C compiler ({', '.join(self.compilers)})")
        return found

    def compile(self, flags: Sequence[str], target: Path) -> None:
        """Compile to another name, then move the file, so that other processes never see a partial file. Raises BuildError,
        OSError."""
        command = [self.compiler(), *self.flags, *flags, *(str(path) for path in self.files(".c"))]
        with _compiling:
            _remove_leftovers(target.parent)
            handle, partial = tempfile.mkstemp(prefix="partial-", suffix=".so", dir=target.parent)
            os.close(handle)
            try:
                _run([*command, "-o", partial, "-lm"])
                Path(partial).replace(target)
            finally:
                Path(partial).unlink(missing_ok=True)


STEP = Code()


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
            "x86-64-v4-amx",
            ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
            _V4 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
        ),
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
        return load_somewhere(STEP, SHIPPED, cache_directories())
    except BuildError as error:
        return str(error)


def load_somewhere(code: Code, shipped: Path, directories: Sequence[Path]) -> tuple[ctypes.CDLL, str]:
    """The best build for this processor in `shipped`. If there is none, compile one in the first of `directories` that allows
    it. Returns the build, loaded, and where it comes from. Raises BuildError."""
    found = shipped_variant(shipped, code=code)
    if found is not None:
        variant, path = found
        library = _load(path)
        return library, f"compiled for {variant.name}{_units(library)}, {path}"
    library, path = _compile_somewhere(directories, code)
    return library, f"compiled for this processor{_units(library)}, {path}"


def shipped_variant(directory: Path, features: frozenset[str] | None = None, code: Code = STEP) -> tuple[Variant, Path] | None:
    """The best variant in `directory` that a processor with these features can run. `features` None: this processor's.

    None if there is no such variant.
    """
    features = _features() if features is None else features
    for variant in VARIANTS.get(platform.machine(), ()):
        path = variant_path(directory, variant, code)
        if variant.needs <= features and path.exists():
            return variant, path
    return None


def variant_path(directory: Path, variant: Variant, code: Code = STEP) -> Path:
    """The file of a compiled variant. Its name has a hash of the source, so a file from other sources is never loaded."""
    return directory / f"step-{variant.name}-{code.hash(*variant.flags)}.so"


def compile_variants(directory: Path, code: Code = STEP, variants: Sequence[Variant] | None = None) -> list[Path]:
    """Compile the code for these kinds of processors. None: every kind of this architecture. Returns the files.

    Raises BuildError.
    """
    paths = []
    for variant in VARIANTS.get(platform.machine(), ()) if variants is None else variants:
        target = variant_path(directory, variant, code)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            code.compile(variant.flags, target)
        except OSError as error:
            raise BuildError(f"{directory}: cannot be written ({error.strerror})") from error
        target.chmod(0o755)
        paths.append(target)
    return paths


def compiled(directory: Path, flags: Sequence[str] = (), code: Code = STEP) -> Path:
    """The shared library in `directory`, for this processor and with these further flags. It is compiled if it is not there
    yet. Raises BuildError.

    The file name has a hash of the source, the flags, the compiler and the processor's features, because different machines may
    share one home directory.
    """
    flags = (NATIVE, *flags)
    compiler = code.compiler()
    version = _run([compiler, "--version"])
    target = directory / f"step-{code.hash(*flags, compiler, version, platform.machine(), *sorted(_features()))}.so"
    try:
        make_private(directory)
        if not target.exists():
            code.compile(flags, target)
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


def _compile_somewhere(directories: Sequence[Path], code: Code) -> tuple[ctypes.CDLL, Path]:
    """Compile and load the step in the first directory that allows both. Raises BuildError."""
    refused = ["there is no directory to compile it to"] if not directories else []
    for directory in directories:
        try:
            path = compiled(directory, code=code)
            library = _load(path)
        except PlaceError as error:
            refused.append(str(error))
            continue
        if refused:
            log.warning("compiled code goes to %s: %s", directory, "; ".join(refused))
        return library, path
    raise BuildError("; ".join(refused))


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # for example, the file system forbids execution
        raise PlaceError(f"{path}: cannot be loaded ({error})") from error


def _units(library: ctypes.CDLL) -> str:
    """Whether products run on matrix units, for `origin`. Code of tests may have no such function."""
    find = getattr(library, "ladimo_matrix_unit", None)
    return " and its matrix units" if find is not None and find() else ""


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


def _features() -> frozenset[str]:
    """The processor's features from /proc/cpuinfo; empty if the system has no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    listed = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(listed.partition(":")[2].split())
