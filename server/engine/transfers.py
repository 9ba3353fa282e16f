"""Copies between host and device that do not make the host wait: through pinned memory, in the order of the device's work."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers (or of rows of them) that work launched from now on will see."""
    host = torch.tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Callable[[], list[int]]:
    """Start copying integers [n]; call the result to wait for them."""
    if values.device.type == "cpu":
        known: list[int] = values.tolist()
        return lambda: known
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[int]:
        copied.synchronize()
        arrived: list[int] = host.tolist()
        return arrived

    return wait
