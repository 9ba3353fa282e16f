"""Threads of the compiled code, which share the work of a call."""

import ctypes
import weakref
from ctypes import c_int64, c_void_p


class Pool:
    """`num_threads` threads, the caller's included. To be used by one thread at a time. Raises MemoryError."""

    def __init__(self, code: ctypes.CDLL, num_threads: int) -> None:
        create, destroy = code.ladimo_create, code.ladimo_destroy
        create.restype, create.argtypes, destroy.restype, destroy.argtypes = c_void_p, [c_int64], None, [c_void_p]
        self.code = code
        self.handle = create(num_threads)
        if not self.handle:
            raise MemoryError("there is no memory for the kernel's threads")
        weakref.finalize(self, destroy, self.handle)
