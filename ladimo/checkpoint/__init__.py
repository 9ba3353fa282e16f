"""Checkpoint directories in Hugging Face layout. Dense models are read; converted models are written and read.

Weights are read from safetensors only, and code of a checkpoint is never run. A file is written completely or not at all. The
converter renames a finished directory into place.
"""

from ladimo.checkpoint.directory import (
    FRONTIER,
    POLICIES,
    TOKENIZER_FILES,
    copy_tokenizer,
    moe_config_json,
    read_config,
    read_eos_token_ids,
    read_frontier,
    read_policies,
    write_policy,
)
from ladimo.checkpoint.files import read_json, resolve_directory, write_json, write_text
from ladimo.checkpoint.loading import (
    choose_dtype,
    load_layer,
    load_model,
    load_quantized_model,
    load_to_serve,
    load_without_layers,
)
from ladimo.checkpoint.tensors import INDEX, TensorReader, content_hash, save_tensors, stored_dtype, write_tensors
from ladimo.model.backends.choose import DTYPES, choose_device

__all__ = [
    "DTYPES",
    "FRONTIER",
    "INDEX",
    "POLICIES",
    "TOKENIZER_FILES",
    "TensorReader",
    "choose_device",
    "choose_dtype",
    "content_hash",
    "copy_tokenizer",
    "load_layer",
    "load_model",
    "load_quantized_model",
    "load_to_serve",
    "load_without_layers",
    "moe_config_json",
    "read_config",
    "read_eos_token_ids",
    "read_frontier",
    "read_json",
    "read_policies",
    "resolve_directory",
    "save_tensors",
    "stored_dtype",
    "write_json",
    "write_policy",
    "write_tensors",
    "write_text",
]
