"""The hardware's limits in bytes and operations per second, measured where the benchmark runs; the bytes that a step reads."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ladimo.model.config import ModelConfig


def seconds_of(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Median seconds of `run` after a warm-up. The device's work is included."""
    run()
    samples: list[float] = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            run()
            samples.append(time.perf_counter() - started)
    return statistics.median(samples)


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes per second of a large copy. Bytes read and bytes written both count."""
    size = size or (4 * 2**30 if device.type == "cuda" else 2**27)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device)


def read_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes per second of a sum over a large tensor, which is only read."""
    size = size or (4 * 2**30 if device.type == "cuda" else 2**29)
    source = torch.zeros(size // 4, device=device)
    return size / seconds_of(source.sum, device)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Floating-point operations per second of a large square matrix product."""
    size = size or (8192 if device.type == "cuda" else 512)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    operations: int = 2 * size**3
    return operations / seconds_of(lambda: left @ right, device)


def decode_bytes(
    config: ModelConfig,
    distinct_experts: Sequence[float | None],
    batch: int,
    context: float,
    itemsize: int,
    weight_size: float | None = None,
) -> float:
    """The bytes that a decode step must read: all dense weights, `distinct_experts` experts per layer (None for a dense layer),
    and the keys and values of `batch` sequences of `context` tokens.

    `itemsize`: bytes per number. `weight_size`: bytes per weight, if they differ from `itemsize`.
    """
    weights = float(config.hidden_size * config.vocab_size)  # the output head; the embedding is not read as a whole
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for layer, distinct in zip(config.layers, distinct_experts, strict=True):
        weights += 2 * config.hidden_size * (heads + kv_heads)
        if layer is None or distinct is None:
            weights += 3 * config.hidden_size * config.intermediate_size
        else:
            weights += distinct * 3 * config.hidden_size * layer.moe_intermediate_size
    cache = 2 * config.num_hidden_layers * kv_heads * context * batch
    return weights * (weight_size or itemsize) + cache * itemsize
