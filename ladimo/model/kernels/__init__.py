"""Triton kernels of the hot path. Each public function has the name, signature and meaning of a torch reference in the plain
modules beside this package, and those modules call it when `available` says so. CUDA builds of torch bring Triton along;
elsewhere these modules are never imported.

All launches are fit for capture in a CUDA graph: shapes and tile sizes follow from the arguments' shapes alone, counts stay on
the device, and nothing is tuned at run time.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def available(*tensors: Tensor) -> bool:
    """Whether a kernel can stand in for torch: Triton is there, the tensors are on a GPU and nobody wants gradients."""
    if not all(tensor.is_cuda for tensor in tensors):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return triton_installed()


@cache
def triton_installed() -> bool:
    return find_spec("triton") is not None
