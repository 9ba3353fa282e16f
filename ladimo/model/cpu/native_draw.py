"""The bridge between rows of logits and `draw.c`. Legend: R rows, V vocabulary."""

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from ladimo.model.cpu.pool import Pool

# Logits below which waking the other threads costs more than they give.
SERIAL_DRAW = 10**5


class _Draw(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("rows", "vocab", "parallel")] + [
        (name, c_void_p) for name in ("logits", "temperature", "top_p", "min_p", "uniform", "top_k", "tokens")
    ]


class NativeDraw:
    """Token ids [R] int64 from logits [R, V]. A token depends on its own row alone, in every bit."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._run = pool.code.ladimo_draw
        self._run.argtypes = [c_void_p, ctypes.POINTER(_Draw)]

    def likeliest(self, logits: Tensor) -> Tensor:
        """The first token with the largest logit. Raises MemoryError."""
        return self._draw(logits.float().contiguous())

    def draw(self, logits: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor, top_k: Tensor) -> Tensor:
        """All [R]: temperature (0 takes the likeliest), top_p, min_p and uniform float64, top_k int64 (0: no limit). Raises
        MemoryError."""
        columns = [column.contiguous() for column in (temperature, top_p, min_p, uniform, top_k)]
        assert [column.dtype for column in columns] == [torch.float64] * 4 + [torch.int64]
        return self._draw(logits.float().contiguous(), *columns)

    def _draw(self, logits: Tensor, *columns: Tensor) -> Tensor:
        (rows, vocab), tokens = logits.shape, torch.empty(len(logits), dtype=torch.int64)
        given: list[int | None] = [column.data_ptr() for column in columns] if columns else [None] * 5
        draw = _Draw(rows, vocab, rows > 1 and logits.numel() >= SERIAL_DRAW, logits.data_ptr(), *given, tokens.data_ptr())
        if self._run(self._pool.handle, draw):
            raise MemoryError(f"no memory to draw {rows} tokens")
        return tokens
