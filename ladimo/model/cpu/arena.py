"""Memory for weights on huge pages: reading all of a model per token, the processor otherwise looks up an address every 4 KiB,
which on a virtual machine halves the bandwidth."""

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
            self._chunks.append(_huge(max(CHUNK, len(source))))
            self._used = 0
        target = self._chunks[-1][self._used : self._used + len(source)]
        target.copy_(source)
        self._used += -(-len(source) // ALIGNMENT) * ALIGNMENT
        return target.data_ptr()


def _huge(size: int) -> Tensor:
    """Fresh memory, on huge pages where the system has them."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
