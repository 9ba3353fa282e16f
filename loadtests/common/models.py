"""Models with real shapes and random weights, made on the device. Speed depends on shapes, not on the values of weights."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ladimo.model.backends.choose import DTYPES, choose_backend, on_device
from ladimo.model.config import ModelConfig, MoeLayerConfig, moe_layers_to_json
from ladimo.model.families import read_model_config
from ladimo.model.moe import Experts
from ladimo.model.nested.layers import NestedExperts, NestedHead, NestedLinear
from ladimo.model.nested.weights import SCALE_DTYPE, STEPS
from ladimo.model.precision import GROUP, NESTED_BITS
from ladimo.model.quantization import QuantizedWeights, find_format
from ladimo.model.quantization.layers import quantize_model
from ladimo.model.router import weight_dtype
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import LayerRule, RoutingPolicy

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
def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> MoeTransformer:
    """A model with normally distributed weights. Those of routers are larger, so that scores differ between tokens."""
    with torch.device("meta"):
        model = MoeTransformer(config)
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        weight = torch.empty(parameter.shape, dtype=weight_dtype(name, dtype), device=device)
        if parameter.ndim == 1:
            weight.fill_(1.0 if "norm" in name else 0.0)
        else:
            weight.normal_(0.0, 0.2 if ".gate." in name else 0.02, generator=generator)
        weights[name] = weight
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False)
    model.rotary.materialise(device)
    on_device(device, dtype).prepare(model)
    return model.eval()


def random_planes(*shape: int, device: torch.device, scale: float = 0.02) -> tuple[QuantizedWeights, QuantizedWeights]:
    """The high and the low plane of matrices [..., N, K] of this size, as a checkpoint's loader makes them."""
    *lead, cols = shape
    width, format = -(-cols // (2 * GROUP)) * GROUP, find_format("int4")
    # Integers are spread evenly over -8 .. 7, whose standard deviation is 4.6.
    steps = (torch.rand(*lead, 2 * width // GROUP, device=device) + 0.5).mul(scale / 4.6).to(SCALE_DTYPE).float()

    def plane(steps: Tensor) -> QuantizedWeights:
        data = torch.randint(-128, 128, (*lead, width), dtype=torch.int8, device=device)
        return QuantizedWeights(data, steps, cols, format)

    return plane(steps), plane(steps / STEPS)


@torch.no_grad()
def random_nested_model(shape: str, dtype: torch.dtype, device: torch.device) -> MoeTransformer:
    """A model as method `nested` makes it: whole weights, and planes of four bits that here are drawn apart from them."""
    layer = replace(partitioned_config(shape, num_experts=1).layers[0], router="none")  # type: ignore[type-var]
    config = replace(
        partitioned_config(shape, 1), layers=(layer,) * SHAPES[shape]["num_hidden_layers"], nested_bits=NESTED_BITS
    )
    model = random_model(config, dtype, device)

    def nest(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                kind = NestedHead if name == "lm_head" else NestedLinear
                setattr(module, name, kind(child.weight, child.bias, random_planes(*child.weight.shape, device=device)))
            elif isinstance(child, Experts):
                parts = (random_planes(*part.shape, device=device) for part in (child.gate_up_proj, child.down_proj))
                setattr(module, name, NestedExperts(child, *parts))
            else:
                nest(child)

    nest(model)
    if model.lm_head is None:
        embedding = model.model.embed_tokens.weight
        model.lm_head = NestedHead(embedding, None, random_planes(*embedding.shape, device=device))
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
