"""Writes rounded weights as llama.cpp's blocks of integers, without rounding them again.

A block is 32 neighbouring columns of a row, with a scale in fp16. Q4_0 has integers from -8 to 7, Q8_0 from -128 to 127. Groups
of nested weights are such blocks: at 4 bits they fit Q4_0, at 8 bits Q8_0. Only their scales are rounded, from bf16 to fp16.
These are the same numbers, except below 2^-14.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
Q4_0, Q8_0 = "Q4_0", "Q8_0"
LOWEST, HIGHEST = -8, 7  # of Q4_0

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def to_blocks(weights: Tensor, steps: Tensor) -> tuple[Bytes, str] | None:
    """Weights [..., N, K] that are whole multiples of `steps` [..., N, K] -> the bytes of each row's blocks, and the smallest
    type that holds them.

    A step of zero says nothing of its weight. None if the blocks do not fit: the width is no multiple of 32, the weights of a
    block have several steps or none, or fp16 does not reach a step.
    """
    if weights.shape[-1] % BLOCK:
        return None
    values, grid = (tensor.float().unflatten(-1, (-1, BLOCK)) for tensor in (weights, steps))
    scales = grid.gather(-1, grid.abs().argmax(dim=-1, keepdim=True))
    stored = scales.half()
    if not bool(((grid == scales) & (scales != 0) | (values == 0)).all() and stored.isfinite().all()):
        return None
    codes = torch.where(scales == 0, 0, values / scales).round()
    lowest, highest = codes.aminmax()
    assert lowest >= -128 and highest <= 127, "at most 8 bits are read of rounded weights"
    head = stored.numpy().view(np.uint8)
    integers = codes.to(torch.int8)
    if lowest >= LOWEST and highest <= HIGHEST:
        first, second = (integers - LOWEST).to(torch.uint8).chunk(2, dim=-1)  # columns 0 to 15, 16 to 31
        return _rows(head, (first | second << 4).numpy()), Q4_0
    return _rows(head, integers.numpy().view(np.uint8)), Q8_0


def _rows(scales: Bytes, integers: Bytes) -> Bytes:
    """Blocks [..., B, bytes] -> rows [..., B * bytes]."""
    blocks = np.concatenate((scales, integers), axis=-1)
    return blocks.reshape(*blocks.shape[:-2], -1)
