"""Export to a GGUF file for llama.cpp: the weights of a dense LLaMA without a tokenizer, so the model takes token ids.

The architecture `llama` of GGUF expects the rows of the query and key projections in the interleaved order of the original
LLaMA code. transformers stores the two halves of each head one after the other. `_interleaved` changes the order.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ladimo.export.dense_view import DenseView
from ladimo.model.config import ModelConfig
from ladimo.model.families import read_model_config

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class GgufTarget:
    """The target `gguf`."""

    name = "gguf"
    help = "model.gguf for llama.cpp: weights in bf16 without a tokenizer, so that it takes token ids"

    def write(self, view: DenseView, out: Path) -> None:
        """Write model.gguf in bf16. Raises ValueError if the package gguf is missing, and as `write_gguf` does."""
        if importlib.util.find_spec("gguf") is None:
            raise ValueError("target 'gguf': the package gguf is not installed (pip install 'ladimo[bench]')")
        config = read_model_config(view.config)
        write_gguf(out / "model.gguf", config, view.tensors(), "BF16")


def write_gguf(path: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], weights: str) -> None:
    """Write a dense LLaMA. `tensors`: its tensors with transformers' names. `weights`: the type of matrices in the file, which
    is F32, BF16, Q8_0 or Q4_0.

    Raises ValueError for models with biases or scaled RoPE, which are not supported.
    """
    import gguf

    if config.attention_bias or config.attention_output_bias or config.rope.type != "default":
        raise ValueError("GGUF: only models without biases and with plain RoPE can be written")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("no_vocab")
    quantization = gguf.GGMLQuantizationType[weights]
    for name, tensor in tensors:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        matrix = tensor.float()
        if ".q_proj." in name or ".k_proj." in name:
            matrix = _interleaved(matrix, config.head_dim)
        stored = quantization if matrix.ndim == 2 else gguf.GGMLQuantizationType.F32
        data: np.ndarray[Any, Any] = gguf.quants.quantize(matrix.contiguous().numpy(), stored)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in ENDS:
        return f"{ENDS[stem]}.weight"
    _, _, index, rest = stem.split(".", 3)
    return f"blk.{index}.{LAYER_NAMES[rest]}.weight"


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of [heads * head_dim, D]: in each head, row i + head_dim / 2 follows row i."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return torch.stack(halves.unbind(dim=1), dim=2).view_as(weight)
