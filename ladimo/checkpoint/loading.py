"""Models from checkpoint directories: whole, one layer at a time, or rounded to integers on the way."""

from pathlib import Path

import torch
from torch import nn

from ladimo.checkpoint.directory import read_config
from ladimo.checkpoint.tensors import DTYPES, TensorReader, stored_dtype
from ladimo.model.config import ModelConfig
from ladimo.model.quantization import Quantize
from ladimo.model.quantized_layers import quantize_layers, quantize_model
from ladimo.model.transformer import DecoderLayer, MoeTransformer


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


def choose_dtype(dtype: str, directory: Path, device: torch.device) -> torch.dtype:
    """ "auto" is the stored dtype on a GPU and fp32 on CPU, where bf16 rounding would make batches disagree."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else stored_dtype(directory)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: supported: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_model(directory: Path, dtype: torch.dtype, device: torch.device) -> MoeTransformer:
    """The whole model, dense or converted, ready to run without gradients."""
    config = read_config(directory)
    reader = TensorReader(directory)
    with torch.device("meta"):
        model = MoeTransformer(config)
    reader.load(model, "", dtype, device)
    model.rotary.materialise(device)
    return model.eval()


def load_quantized_model(directory: Path, dtype: torch.dtype, device: torch.device, format: Quantize) -> MoeTransformer:
    """`load_model` with weights rounded to integers: layer by layer, so that one layer at most is in memory in `dtype`."""
    config = read_config(directory)
    reader = TensorReader(directory)
    model = load_without_layers(reader, config, dtype, device)
    quantize_model(model, format)  # the output head; there are no layers yet
    for index in range(config.num_hidden_layers):
        layer = load_layer(reader, config, index, dtype, device)
        quantize_layers(layer, format)
        model.model.layers.append(layer)
    return model.eval()


def load_layer(reader: TensorReader, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device) -> DecoderLayer:
    """One layer alone, for work that keeps one layer in memory at a time."""
    with torch.device("meta"):
        module = DecoderLayer(config, layer)
    reader.load(module, f"model.layers.{layer}.", dtype, device)
    return module.eval()


def load_without_layers(reader: TensorReader, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> MoeTransformer:
    """Embedding, final norm, output head and rotary table; the layers are left out (`model.layers` is empty)."""
    with torch.device("meta"):
        model = MoeTransformer(config)
    model.model.layers = nn.ModuleList()
    reader.load(model, "", dtype, device)
    model.rotary.materialise(device)
    return model.eval()
