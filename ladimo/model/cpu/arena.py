"""Memory on huge pages, for weights and KV cache.

Each token reads the whole model. With normal pages the processor must translate an address every 4 KiB, which halves the memory
bandwidth on a virtual machine.
"""

import mmap

import torch
from torch import Tensor

CHUNK = 2**26  # bytes, a multiple of a huge page; the unused rest of the last chunk is never touched
ALIGNMENT = 64


class Arena:
    """Holds copies of tensors. The memory is freed with the arena."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._used = 0  # of the last chunk

    @property
    def used(self) -> int:
        """Bytes that are taken, those that are left free at the ends of chunks included."""
        return sum(len(chunk) for chunk in self._chunks[:-1]) + self._used

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """Room for `count` numbers, to be written once."""
        size = count * dtype.itemsize
        if not self._chunks or self._used + size > len(self._chunks[-1]):
            self._chunks.append(huge_zeros(max(CHUNK, size), torch.uint8))
            self._used = 0
        room = self._chunks[-1][self._used : self._used + size]
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return room.view(dtype)

    def keep(self, tensor: Tensor) -> int:
        """Copy the content of a tensor into the arena, unless it lies there already. Returns its address there."""
        if any(chunk.data_ptr() <= tensor.data_ptr() < chunk.data_ptr() + len(chunk) for chunk in self._chunks):
            return tensor.data_ptr()
        source = tensor.detach().contiguous().flatten()
        return self.empty(len(source), source.dtype).copy_(source).data_ptr()


def huge_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros [count], on huge pages if the system has them. A page takes no memory before it is written."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
