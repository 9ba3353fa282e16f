"""Picks the back end of a model when it is loaded."""

import logging
from functools import cache
from importlib.util import find_spec

import torch

from ladimo.model.backends.native_backend import NativeBackend
from ladimo.model.backends.torch_backend import TorchBackend
from ladimo.model.config import ModelConfig
from ladimo.model.cpu.build import origin
from ladimo.model.cpu.native_step import Unsupported, check_supported
from ladimo.model.quantization import find_format

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The number of threads that torch chose at the start: the number of cores, or what OMP_NUM_THREADS says.
NUM_THREADS = torch.get_num_threads()

log = logging.getLogger(__name__)


def choose_device(device: str) -> torch.device:
    """The device of this name. "auto" is CUDA if there is a GPU, otherwise the CPU. Raises ValueError for a missing device.

    A GPU gets a number, because other threads may have another current device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: not a device name") from error
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r}: not available on this machine")
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else chosen


def resolve_dtype(dtype: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of this name. "auto" is the stored dtype on a GPU, and fp32 on a CPU.

    In bf16 on a CPU, torch's results for a request would depend on the rest of the batch. Raises ValueError for an unknown
    name.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: supported: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def choose_backend(
    config: ModelConfig, stored: torch.dtype, device: str = "auto", dtype: str = "auto", quantize: str | None = None
) -> TorchBackend:
    """The back end that serves a model. `stored` is the dtype of the weights on disk. `quantize`: an integer format, or None.

    Raises ValueError for a device, dtype or integer format that is not available here.
    """
    chosen = choose_device(device)
    if quantize is not None:
        find_format(quantize)
    if chosen.type == "cpu":
        return _on_cpu(config, stored, chosen, dtype, quantize)
    return on_device(chosen, resolve_dtype(dtype, stored, chosen), quantize)


def on_device(device: torch.device, dtype: torch.dtype, quantize: str | None = None) -> TorchBackend:
    """The back end for modules that run with or without a cache: Triton's on a GPU with Triton, otherwise torch's.

    Raises ValueError for an integer format without kernels on this device.
    """
    if device.type != "cuda" or not triton_installed():
        if quantize is not None:
            raise ValueError(f"quantize {quantize}: Triton is not installed")
        return TorchBackend(device, dtype, num_threads=NUM_THREADS)
    from ladimo.model.backends.triton_backend import BITS, TritonBackend

    if quantize is not None and find_format(quantize).bits not in BITS:
        raise ValueError(f"quantize {quantize}: there are no GPU kernels for it")
    return TritonBackend(device, dtype, quantize)


def _on_cpu(config: ModelConfig, stored: torch.dtype, device: torch.device, dtype: str, quantize: str | None) -> TorchBackend:
    # bf16 is fine here: unlike torch, the compiled step gives a request the same numbers in every batch.
    native = stored if dtype == "auto" and stored == torch.bfloat16 else resolve_dtype(dtype, stored, device)
    try:
        check_supported(config, native, quantize)
    except Unsupported as reason:
        if quantize is not None:
            raise ValueError(f"quantize {quantize}: {reason}") from reason
        log.warning("torch computes on this CPU: %s", reason)
        return TorchBackend(device, resolve_dtype(dtype, stored, device), num_threads=NUM_THREADS)
    log.info("the compiled step computes on this CPU: %s", origin())
    return NativeBackend(device, native, quantize, NUM_THREADS)


@cache
def triton_installed() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None
