"""The conditions of a measurement: hardware, versions, commit, and the load from other processes."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from ladimo.prefill.processor import cpu_name


def conditions() -> dict[str, Any]:
    """The conditions to store with every measurement."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit(),
    }


class OtherLoad:
    """Measures the load of other processes. On a shared machine a result means little without it."""

    def __init__(self) -> None:
        self._total, self._own = _busy_seconds(), _own_seconds()

    def cores(self, seconds: float) -> float:
        """The number of cores that others kept busy since the constructor. `seconds`: the time since then."""
        others = (_busy_seconds() - self._total) - (_own_seconds() - self._own)
        return max(0.0, others / seconds)


def _busy_seconds() -> float:
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"
