"""Memory on huge pages for weights and cache: with all of a model read per token, the processor otherwise looks up an address
every 4 KiB, which on a virtual machine halves the bandwidth."""

import mmap

import torch
from torch import Tensor

CHUNK = 2**26  # a multiple of a huge page; what a model leaves of its last one is never touched
ALIGNMENT = 64


class Arena:
    """Keeps copies of tensors. Memory is given back when the arena dies."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._used = 0

    def keep(self, tensor: Tensor) -> int:
        """Copy the tensor's content; its address."""
        source = tensor.detach().contiguous().flatten().view(torch.uint8)
        if not self._chunks or self._used + len(source) > len(self._chunks[-1]):
            self._chunks.append(huge_zeros(max(CHUNK, len(source)), torch.uint8))
            self._used = 0
        target = self._chunks[-1][self._used : self._used + len(source)]
        target.copy_(source)
        self._used += -(-len(source) // ALIGNMENT) * ALIGNMENT
        return target.data_ptr()


def huge_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros [count], on huge pages where the system has them. Nothing is in memory before it is written to."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
