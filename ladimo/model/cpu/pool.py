"""The threads of the compiled code. They share the work of each call."""

import ctypes
import weakref
from ctypes import c_int64, c_void_p


class Pool:
    """A pool of `num_threads` threads, including the calling one. Only one thread may use it at a time. Raises MemoryError."""

    def __init__(self, code: ctypes.CDLL, num_threads: int) -> None:
        create, destroy = code.ladimo_create, code.ladimo_destroy
        create.restype, create.argtypes, destroy.restype, destroy.argtypes = c_void_p, [c_int64], None, [c_void_p]
        self.code = code
        self.handle = create(num_threads)
        if not self.handle:
            raise MemoryError("there is no memory for the kernel's threads")
        weakref.finalize(self, destroy, self.handle)
