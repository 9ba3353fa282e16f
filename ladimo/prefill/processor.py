"""The name of the processor that a measurement belongs to."""

import platform
from pathlib import Path

import torch


def processor_name(device: torch.device, threads: int) -> str:
    """The name of a GPU, or that of the CPU and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}"


def cpu_name() -> str:
    """The CPU's name; its architecture where the system does not say more."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
