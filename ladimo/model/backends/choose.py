"""Which back end a model gets: said once, when it is loaded."""

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
# What torch would use: as many as there are cores, or as the operator says.
NUM_THREADS = torch.get_num_threads()

log = logging.getLogger(__name__)


def choose_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: not a device name") from error
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r}: not available on this machine")
    return chosen


def resolve_dtype(dtype: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is the stored dtype on a GPU. On a CPU it is fp32, where torch's bf16 would make batches disagree.

    Raises ValueError for a name that is none of them.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: supported: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def choose_backend(
    config: ModelConfig, stored: torch.dtype, device: str = "auto", dtype: str = "auto", quantize: str | None = None
) -> TorchBackend:
    """The back end to serve a model with whose weights are `stored` so.

    Raises ValueError for a device, dtype or integer format that cannot be had here.
    """
    chosen = choose_device(device)
    if quantize is not None:
        find_format(quantize)
    if chosen.type == "cpu":
        return _on_cpu(config, stored, chosen, dtype, quantize)
    return on_device(chosen, resolve_dtype(dtype, stored, chosen), quantize)


def on_device(device: torch.device, dtype: torch.dtype, quantize: str | None = None) -> TorchBackend:
    """The back end for modules that compute with or without a cache on a device: kernels on a GPU that has Triton."""
    if device.type != "cuda" or not triton_installed():
        if quantize is not None:
            raise ValueError(f"quantize {quantize}: Triton is not installed")
        return TorchBackend(device, dtype, num_threads=NUM_THREADS)
    from ladimo.model.backends.triton_backend import BITS, TritonBackend

    if quantize is not None and find_format(quantize).bits not in BITS:
        raise ValueError(f"quantize {quantize}: there are no GPU kernels for it")
    return TritonBackend(device, dtype, quantize)


def _on_cpu(config: ModelConfig, stored: torch.dtype, device: torch.device, dtype: str, quantize: str | None) -> TorchBackend:
    # In bf16, too, the compiled step's numbers for a request are the same in every batch, which torch's are not.
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
    return find_spec("triton") is not None
