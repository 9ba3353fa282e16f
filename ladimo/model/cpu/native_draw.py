"""Calls `draw.c` to draw tokens from logits. Legend: R rows, V vocabulary."""

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from ladimo.model.cpu.pool import Pool

# With fewer logits (R * V) than this, waking the other threads would cost more time than it saves.
SERIAL_DRAW = 10**5


class _Draw(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("rows", "vocab", "parallel")] + [
        (name, c_void_p) for name in ("logits", "temperature", "top_p", "min_p", "uniform", "top_k", "tokens")
    ]


class NativeDraw:
    """Draws token ids [R] int64 from logits [R, V]. Each token depends on its own row only, in every bit."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._run = pool.code.ladimo_draw
        self._run.argtypes = [c_void_p, ctypes.POINTER(_Draw)]

    def likeliest(self, logits: Tensor) -> Tensor:
        """The token with the largest logit in each row; the first one on a tie. Raises MemoryError."""
        return self._draw(logits.float().contiguous())

    def draw(self, logits: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor, top_k: Tensor) -> Tensor:
        """Draw a token for each row. Parameters are [R]: temperature (0 = greedy), top_p, min_p, uniform in float64; top_k in
        int64 (0 = no limit). Raises MemoryError."""
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
