"""All checks and measurements that need a GPU, in one command: the gpu tests, the kernels, and the engine at a real shape.

    python -m loadtests.gpu_suite --out results [--only decode,prefill] [--seconds 480] [--one-process]
    python -m loadtests.gpu_suite --dry-run

Each section runs in its own process with a time limit. If a section fails, hangs or corrupts the device, the other sections are
not lost, and the results that it had by then are kept. With --one-process they share a process, which saves imports. Then
a section that hangs in the device loses the later ones. Every section prints a table and then one JSON line, which is also
written to OUT/<section>.json. The model has the shape of LLaMA-2-7B (see --shape), random weights in bf16 made on the device,
and 8 experts per layer, which partition the FFN and count with weight 1. --dry-run runs all sections on a CPU at tiny sizes, to
check that they work. Its figures mean nothing.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from loadtests.common.conditions import conditions
from loadtests.common.models import SHAPES
from loadtests.gpu.bench import Bench
from loadtests.gpu.decode import decode, integers, nested
from loadtests.gpu.serving import batches, counting, prefill, swap
from loadtests.gpu.step_profile import step_profile

ROOT = Path(__file__).parent.parent
DRY_LIMIT = 240  # seconds per section of a dry run
LEAST_SECONDS = 5.0


def kernels(bench: Bench) -> None:
    """Each kernel compared to the limits of the hardware. Runs `loadtests.gpu.kernel_bench`."""
    command = [sys.executable, "-m", "loadtests.gpu.kernel_bench", *(["--dry-run"] if bench.dry else [])]
    last = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for last in process.stdout:
            print(last, end="", flush=True)
    if process.returncode:
        raise RuntimeError(f"kernel_bench ended with {process.returncode}")
    bench.rows = json.loads(last)["results"]


def gpu_tests(bench: Bench) -> None:
    """Run the tests with the marker gpu. A dry run only collects them."""
    command = [sys.executable, "-m", "pytest", "-q", "-c", "tests/gpu/pytest.ini", "--rootdir", ".", "--confcutdir", "."]
    command += ["-p", "no:cacheprovider", "-m", "gpu", "tests/gpu", *(["--collect-only"] if bench.dry else ["--tb=short"])]
    environment = {**os.environ}
    if not bench.dry and importlib.util.find_spec("xdist"):  # most of the time goes to compiling kernels, one core each
        command += ["-n", str(min(10, os.cpu_count() or 1)), "-p", "xdist"]
        environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (bench.out / "tests.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    print(done.stdout[-6000:])
    summary = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-1:]
    bench.row(exit_code=done.returncode, summary=" ".join(summary))
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}; see tests.log")


# In the order of execution, each with its time limit in seconds.
SECTIONS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "decode": (decode, 80),
    "integers": (integers, 50),
    "nested": (nested, 90),
    "profile": (step_profile, 80),
    "prefill": (prefill, 60),
    "swap": (swap, 45),
    "counting": (counting, 60),
    "batches": (batches, 130),
    "tests": (gpu_tests, 120),
    "kernels": (kernels, 135),
}


def run_section(bench: Bench, measure: Callable[[Bench], None]) -> None:
    """Run a section in this process. What it had measured when it failed is kept."""
    started = time.perf_counter()
    try:
        measure(bench)
    except BaseException as error:
        bench.notes["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        bench.notes["seconds"] = time.perf_counter() - started
        print(json.dumps(bench.save()), flush=True)
        gc.collect()


def in_time(
    limits: Mapping[str, float], seconds: float, run: Callable[[str, float], str], least: float = LEAST_SECONDS
) -> dict[str, str]:
    """`run` each section with the seconds that it may take. Returns the outcome of each by name.

    `limits`: the most that each may take; `seconds`: that all may take together. A section does not begin with less than
    `least` seconds left.
    """
    started = time.monotonic()
    outcome: dict[str, str] = {}
    for name in limits:
        begun = time.monotonic()
        limit = min(limits[name], seconds - (begun - started))
        if limit < least:
            outcome[name] = "skipped: no time left"
            continue
        print(f"\n== {name}", flush=True)
        outcome[name] = f"{run(name, limit)} ({time.monotonic() - begun:.0f} s)"
    return outcome


def run_all(
    commands: Mapping[str, list[str]], limits: Mapping[str, float], seconds: float, least: float = LEAST_SECONDS
) -> dict[str, str]:
    """Run each section in its own process. See `in_time`."""

    def run(name: str, limit: float) -> str:
        process = subprocess.Popen(commands[name], cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
            return "ok" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and all processes that it has started
                process.wait()

    return in_time(limits, seconds, run, least)


class OutOfTime(BaseException):
    """A section took longer than it may. No `except Exception` of a section or a library takes it for an error of its own."""


def run_here(sections: Mapping[str, Callable[[], None]], limits: Mapping[str, float], seconds: float) -> dict[str, str]:
    """Run the sections in this process. See `in_time`. A section is interrupted in Python code only."""

    def interrupt(*_: object) -> None:
        raise OutOfTime("out of time")

    def run(name: str, limit: float) -> str:
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            sections[name]()
            return "ok"
        except (Exception, OutOfTime) as error:
            return f"failed: {type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        return in_time(limits, seconds, run)
    finally:
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-suite"), help="directory of the JSON files")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--seconds", type=float, default=560.0, help="time limit of all sections together")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: llama-2-7b; in a dry run: tiny")
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU at tiny sizes")
    parser.add_argument("--one-process", action="store_true", help="run all sections in this process")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    shape = args.shape or ("tiny" if args.dry_run else "llama-2-7b")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        run_section(Bench(args.section, args.out, shape, args.dry_run), SECTIONS[args.section][0])
        return 0
    names = [name for name in args.only.split(",") if name]
    if unknown := sorted(set(names) - set(SECTIONS)):
        parser.error(f"there is no section {unknown[0]!r}; sections: {', '.join(SECTIONS)}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run runs on CPU")
    flags = ["--out", str(args.out.resolve()), "--shape", shape, *(["--dry-run"] if args.dry_run else [])]
    limits = {name: DRY_LIMIT if args.dry_run else SECTIONS[name][1] for name in names}
    seconds = math.inf if args.dry_run else args.seconds
    if args.one_process:
        benches = {name: Bench(name, args.out, shape, args.dry_run) for name in names}
        outcome = run_here({name: partial(run_section, benches[name], SECTIONS[name][0]) for name in names}, limits, seconds)
    else:
        commands = {name: [sys.executable, "-m", "loadtests.gpu_suite", "--section", name, *flags] for name in names}
        outcome = run_all(commands, limits, seconds)
    print()
    for name, what in outcome.items():
        print(f"{name:<10} {what}")
    print(json.dumps({"benchmark": "gpu_suite", "dry_run": args.dry_run, "sections": outcome, **conditions()}))
    return int(any(not what.startswith("ok") for what in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
