"""Loads models from checkpoint directories: as a whole, one layer at a time, or rounded to integers."""

from pathlib import Path

import torch
from torch import nn

from ladimo.checkpoint.directory import read_config
from ladimo.checkpoint.tensors import TensorReader, stored_dtype
from ladimo.model.attention.layer import Attention
from ladimo.model.backends.choose import choose_backend, on_device, resolve_dtype
from ladimo.model.backends.torch_backend import TorchBackend
from ladimo.model.config import ModelConfig
from ladimo.model.nested.layers import EMBEDDING, TIED_HEAD, matrix_named, nest_layers, nest_tied
from ladimo.model.quantization.layers import quantize_layers, quantize_model
from ladimo.model.transformer import DecoderLayer, MoeTransformer


def choose_dtype(dtype: str, directory: Path, device: torch.device) -> torch.dtype:
    """The dtype in which torch computes the model in `directory`. See `resolve_dtype`; raises ValueError for an unknown
    name."""
    needed = dtype == "auto" and device.type != "cpu"
    return resolve_dtype(dtype, stored_dtype(directory) if needed else torch.float32, device)


def load_to_serve(
    directory: Path, device: str = "auto", dtype: str = "auto", quantize: str | None = None, context: int | None = None
) -> MoeTransformer:
    """Load the whole model on the back end that fits this machine, to serve it.

    `quantize`: an integer format for the weights; None keeps them as they are. `context`: the length of the longest text, as in
    `RotaryEmbedding.materialise`. Raises ValueError for a checkpoint that cannot
    be served, and for a device, dtype or integer format that is not available.
    """
    config = read_config(directory)
    if quantize is not None and config.nested_bits:
        raise ValueError(f"quantize {quantize}: the checkpoint has 4 and 8 bits of its own; a policy's `bits` choose them")
    backend = choose_backend(config, stored_dtype(directory), device, dtype, quantize)
    if quantize is not None and not backend.quantizes_as_it_packs:
        return load_quantized_model(directory, backend, context)
    model = load_model(directory, backend.dtype, backend.device, context)
    backend.prepare(model)
    backend.release_memory()
    return model


def load_model(directory: Path, dtype: torch.dtype, device: torch.device, context: int | None = None) -> MoeTransformer:
    """Load the whole model, dense or converted, to run it without gradients. `context`: as in `load_to_serve`.

    Raises ValueError for a broken checkpoint.
    """
    config = read_config(directory)
    reader = TensorReader(directory)
    with torch.device("meta"):
        model = MoeTransformer(config)
    load_into(model, reader, config, dtype, device)
    model.rotary.materialise(device, context)
    on_device(device, dtype).prepare(model)
    return model.eval()


def load_quantized_model(directory: Path, backend: TorchBackend, context: int | None = None) -> MoeTransformer:
    """Load a model and round its weights to the back end's integer format, layer by layer.

    At most one layer is in memory in floating point at a time. `context`: as in `load_to_serve`. Raises ValueError for a broken
    checkpoint.
    """
    assert backend.quantize is not None
    config = read_config(directory)
    reader = TensorReader(directory)
    model = load_without_layers(reader, config, backend.dtype, backend.device, context)
    quantize_model(model, backend.quantize)  # rounds the output head only, because there are no layers yet
    for index in range(config.num_hidden_layers):
        layer = load_layer(reader, config, index, backend.dtype, backend.device)
        quantize_layers(layer, backend.quantize)
        model.model.layers.append(layer)
    backend.prepare(model)
    backend.release_memory()
    return model.eval()


def load_layer(reader: TensorReader, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device) -> DecoderLayer:
    """Load a single layer, for work that has one layer in memory at a time. Raises ValueError for a broken checkpoint."""
    with torch.device("meta"):
        module = DecoderLayer(config, layer)
    load_into(module, reader, config, dtype, device, f"model.layers.{layer}.")
    on_device(device, dtype).prepare(module)
    return module.eval()


def load_without_layers(
    reader: TensorReader, config: ModelConfig, dtype: torch.dtype, device: torch.device, context: int | None = None
) -> MoeTransformer:
    """Load everything but the layers: embedding, final norm, output head and rotary table. `model.layers` is empty."""
    with torch.device("meta"):
        model = MoeTransformer(config)
    model.model.layers = nn.ModuleList()
    load_into(model, reader, config, dtype, device)
    model.rotary.materialise(device, context)
    on_device(device, dtype).prepare(model)
    return model.eval()


def load_into(
    module: nn.Module, reader: TensorReader, config: ModelConfig, dtype: torch.dtype, device: torch.device, prefix: str = ""
) -> None:
    """Read the weights of a module on the meta device, at all precisions that the checkpoint keeps. `prefix` and a name in the
    module are the name of a tensor. Raises ValueError for a broken checkpoint."""
    planes = set()
    if config.nested_top_bits is not None:
        for name, _ in module.named_parameters():
            tied = prefix + name == EMBEDDING and config.tie_word_embeddings
            if (TIED_HEAD if tied else matrix_named(prefix + name)).high in reader:
                planes.add(name)
    reader.load(module, prefix, dtype, device, planes)
    for part in module.modules():  # numbers that config.json has
        if isinstance(part, Attention) and part.channels is not None:
            part.channels = part.channels.to(device)
    if not config.nested_bits:
        return
    if isinstance(module, MoeTransformer) and module.lm_head is None:
        module.model.embed_tokens, module.lm_head = nest_tied(module.model.embed_tokens, reader, dtype, device)
    nest_layers(module, reader, dtype, device, prefix)
