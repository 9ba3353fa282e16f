"""Copies between host and device for which the host does not wait.

They use pinned memory, and the device runs them in the order of its other work.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers, or rows of numbers, to `device`. Work that is launched later sees them."""
    host = torch.tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Callable[[], list[int]]:
    """Start to copy integers [n] to the host. Call the returned function to wait for them."""
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
