"""Models with real shapes and random weights, made on the device. Speed depends on shapes, not on the values of weights."""

from dataclasses import replace
from typing import Any

import torch

from ladimo.model.backends.choose import DTYPES, choose_backend
from ladimo.model.config import ModelConfig, MoeLayerConfig, moe_layers_to_json
from ladimo.model.families import read_model_config
from ladimo.model.precision import NESTED_BITS
from ladimo.model.quantization.layers import quantize_model
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import LayerRule, RoutingPolicy
from ladimo.prefill.random_weights import nest_randomly, random_model

# Fields of config.json for dense models.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "125m": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}


def partitioned_config(shape: str, num_experts: int = 8) -> ModelConfig:
    """Every FFN is divided into equal experts that count with weight 1. All of them together are the dense FFN."""
    size = SHAPES[shape]["intermediate_size"] // num_experts
    assert size * num_experts == SHAPES[shape]["intermediate_size"]
    layer = MoeLayerConfig(num_experts, num_experts, size, expert_weight="one")
    layers = (layer,) * SHAPES[shape]["num_hidden_layers"]
    return read_model_config({**SHAPES[shape], "model_type": "ladimo_llama", "moe_layers": moe_layers_to_json(layers)})


def dense_config(shape: str) -> ModelConfig:
    return read_model_config({**SHAPES[shape], "model_type": "llama"})


@torch.no_grad()
def random_nested_model(shape: str, dtype: torch.dtype, device: torch.device) -> MoeTransformer:
    """A model as method `nested` makes it: whole weights, and planes of four bits that here are drawn apart from them."""
    layer = replace(partitioned_config(shape, num_experts=1).layers[0], router="none")  # type: ignore[type-var]
    config = replace(
        partitioned_config(shape, 1), layers=(layer,) * SHAPES[shape]["num_hidden_layers"], nested_bits=NESTED_BITS
    )
    model = random_model(config, dtype, device)
    nest_randomly(model)
    model.backend.prepare(model)
    return model


def prepare_to_serve(model: MoeTransformer, quantize: str | None = None) -> None:
    """Prepare a model with the back end that the server would use. `quantize` rounds its weights to an integer format."""
    loaded = model.backend
    dtype = next(name for name, value in DTYPES.items() if value == loaded.dtype)
    backend = choose_backend(model.config, loaded.dtype, str(loaded.device), dtype, quantize)
    if quantize is not None and not backend.quantizes_as_it_packs:
        quantize_model(model, quantize)
    backend.prepare(model)


def top_k_policy(
    config: ModelConfig, name: str, top_k: int, experts: tuple[int, ...] | None = None, batch_experts: int | None = None
) -> RoutingPolicy:
    """A policy with one rule in every expert layer: `top_k` of all experts, of a fixed subset, or under a batch budget."""
    rule = LayerRule(top_k=top_k, renormalize=False, experts=experts, batch_experts=batch_experts)
    return RoutingPolicy(name, "", tuple(None if layer is None else rule for layer in config.layers))
