"""Checks of the dense checkpoint before any work. Errors name the file and the field."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ladimo.checkpoint import DTYPES, TensorReader, read_config
from ladimo.convert.data.calibration import Encoder
from ladimo.model.config import ModelConfig
from ladimo.model.transformer import MoeTransformer

COMPUTED = "rotary_emb.inv_freq"  # stored by older releases of transformers, but computed from config.json


def check_source(directory: Path) -> ModelConfig:
    """Raises ValueError unless this is a complete dense model with its own tokenizer.

    It must have every tensor of the configuration, in the right shape, with finite values. Its layers must have no other
    tensors. Every weight is read once, one tensor at a time.
    """
    config = read_config(directory)
    if config.moe_layer_indices:
        raise ValueError(f"{directory}: is a Mixture-of-Experts already; give a dense model")
    Encoder(directory, config)
    reader = TensorReader(directory)
    expected = {name: tuple(parameter.shape) for name, parameter in model_parameters(config)}
    for name, shape in expected.items():
        if name not in reader or reader.shape(name) != shape:
            found = f"has shape {list(reader.shape(name))}" if name in reader else "is missing"
            raise ValueError(f"{directory}: {name} {found}, config.json asks for {list(shape)}")
    for name, file in reader.unused(expected).items():
        if name.startswith("model.layers.") and not name.endswith(COMPUTED):
            raise ValueError(f"{file}: {name} belongs to no layer that config.json describes")
    for name in expected:
        check_values(reader, name)
    return config


def check_values(reader: TensorReader, name: str) -> None:
    """Raises ValueError unless the tensor is bf16, fp16 or fp32 and every value in it is finite."""
    tensor = reader.get(name)
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"{reader.file(name)}: {name} is {tensor.dtype}; supported: {', '.join(DTYPES)}")
    low, high = (value.item() for value in tensor.aminmax())  # both are NaN if any value is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{reader.file(name)}: {name} has a value that is {'NaN' if math.isnan(low) else 'infinite'}")


def model_parameters(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The name and the meta tensor of each parameter of a model with this configuration, in the model's order."""
    with torch.device("meta"):
        model = MoeTransformer(config)
    yield from model.named_parameters()
