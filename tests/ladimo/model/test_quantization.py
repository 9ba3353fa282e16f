"""Weights as integers: what is stored stands for what `quantize` rounded, and a model holds nothing else."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.checkpoint import load_model, load_quantized_model, load_to_serve, loading, read_policies
from ladimo.model.backends.choose import on_device
from ladimo.model.backends.torch_backend import TorchBackend
from ladimo.model.experts import apply_experts, apply_experts_masked
from ladimo.model.inputs import StepInputs, StepOutput
from ladimo.model.moe import Experts
from ladimo.model.quantization import GROUP, dequantize, find_format, formats, linear, quantize, quantize_weights
from ladimo.model.quantization.layers import QuantizedExperts, QuantizedLinear, quantize_layers, quantize_model
from ladimo.model.router import Router
from ladimo.model.transformer import MoeTransformer
from tests.factories import VOCAB_SIZE, make_dense, make_moe
from tests.ladimo.stepping import make_tables

CPU = torch.device("cpu")
FORMATS = ("int8", "int4")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 32), (5, 64), (1, 1), (7, 33), (4, 100), (2, 6, 96), (2, 3, 5, 70), (1200, 32)])
def test_stored_integers_stand_for_what_was_rounded(shape: tuple[int, ...], format: str) -> None:
    """Also where columns do not fill the last group, or a byte, and where rows come in more than one part."""
    weights = normal(*shape)
    stored = quantize_weights(weights, format)
    filled = F.pad(weights.flatten(0, -2), (0, -shape[-1] % GROUP))
    expected = dequantize(*quantize(filled, find_format(format)))[:, : shape[-1]].view(shape)
    assert stored.shape == shape
    assert stored.bits == int(format.removeprefix("int"))
    assert torch.equal(stored.to_dtype(torch.float32), expected)
    error = (expected - weights).abs().max()
    assert error <= weights.abs().max() * (0.2 if format == "int4" else 0.5 / find_format(format).highest) * 1.001


@pytest.mark.parametrize(("format", "most"), [("int8", 9 / 8), ("int4", 5 / 8)])
def test_what_a_weight_takes(format: str, most: float) -> None:
    """In bytes, the scale's share included."""
    stored = quantize_weights(normal(6, 256), format)
    assert stored.nbytes / (6 * 256) == most


@pytest.mark.parametrize("format", FORMATS)
def test_columns_that_fill_up_are_zero(format: str) -> None:
    stored = quantize_weights(normal(5, 40), format)
    wider = replace(stored, cols=64).to_dtype(torch.float32)
    assert (wider[:, 40:] == 0).all() and (wider[:, :40] != 0).any()


@pytest.mark.parametrize("format", FORMATS)
def test_products_are_those_of_the_rounded_weights(format: str) -> None:
    """The reference of the kernels: dequantise and multiply."""
    x, bias, weights = normal(2, 3, 50), normal(7), quantize_weights(normal(7, 50), format)
    expected = F.linear(x, weights.to_dtype(torch.float32), bias)
    assert torch.equal(linear(x, weights, bias), expected)
    gate_up, down = quantize_weights(normal(3, 20, 50), format), quantize_weights(normal(3, 50, 10), format)
    ids = torch.tensor([[0, 2, -1], [1, -1, -1], [-1, -1, -1]])
    scores = (ids >= 0).float()
    out = apply_experts(x[0], scores, ids, gate_up, down)
    whole = gate_up.to_dtype(torch.float32), down.to_dtype(torch.float32)
    torch.testing.assert_close(out, apply_experts_masked(x[0], scores, ids, *whole), rtol=1e-4, atol=1e-4)
    assert (out[2] == 0).all() and (out[:2] != 0).all()


def logits(model: MoeTransformer, path: Path) -> Tensor:
    tables = make_tables(model, list(read_policies(path, model.config).values()))
    ids = torch.randint(VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out: StepOutput = model(StepInputs.whole_sequences(ids), None, tables)
    return out.logits


@torch.no_grad()
def round_in_place(model: MoeTransformer, format: str) -> None:
    """The same weights as numbers of the model's own dtype; routers stay."""
    spared = {part for router in model.modules() if isinstance(router, Router) for part in router.modules()}
    for module in model.modules():
        if isinstance(module, (nn.Linear, Experts)) and module not in spared:
            for parameter in module.parameters(recurse=False):
                if parameter.ndim > 1:
                    parameter.copy_(quantize_weights(parameter, format).to_dtype(parameter.dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layer": {"router": "mlp", "router_hidden_size": 7}},
        {"model_type": "qwen2", "hidden_size": 48, "intermediate_size": 88},
    ],
    ids=["linear_router", "mlp_router", "biases_and_odd_sizes"],
)
def test_a_model_of_integers_is_the_model_of_rounded_weights(tmp_path: Path, fields: dict[str, Any], format: str) -> None:
    path = make_moe(tmp_path, **fields)
    model, rounded, original = (load_model(path, torch.float32, CPU) for _ in range(3))
    quantize_model(model, format)
    round_in_place(rounded, format)
    torch.testing.assert_close(logits(model, path), logits(rounded, path), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model, path), logits(original, path), rtol=0, atol=1e-3)
    left = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert left == {name for name, _ in original.named_parameters() if ".gate." in name or "embed" in name}


@pytest.mark.parametrize("format", FORMATS)
def test_a_head_that_is_the_embedding_gets_integers_beside_it(tmp_path: Path, format: str) -> None:
    path = make_dense(tmp_path, tie_word_embeddings=True)
    model, original = (load_model(path, torch.float32, CPU) for _ in range(2))
    quantize_model(model, format)
    head: nn.Module | None = model.lm_head
    assert isinstance(head, QuantizedLinear)
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    expected = quantize_weights(original.model.embed_tokens.weight, format).to_dtype(torch.float32)
    assert torch.equal(head.quantized.to_dtype(torch.float32), expected)
    hidden_states = normal(3, model.config.hidden_size)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(hidden_states), F.linear(model.model.norm(hidden_states), expected))


@pytest.mark.parametrize("format", FORMATS)
def test_loading_rounds_layer_by_layer(moe_dir: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """When a layer is read, the one before is integers, and nobody holds the weights it had."""
    alive: list[weakref.ref[Tensor]] = []
    real = loading.load_layer

    def load_layer(*arguments: Any) -> nn.Module:
        assert not [weight for weight in alive if weight() is not None]
        layer = real(*arguments)
        alive.extend(weakref.ref(parameter) for parameter in layer.parameters() if parameter.ndim == 3)
        alive.extend(weakref.ref(module.weight) for module in layer.modules() if isinstance(module, nn.Linear))
        return layer

    monkeypatch.setattr(loading, "load_layer", load_layer)
    model = load_quantized_model(moe_dir, TorchBackend(CPU, torch.float32, format))
    assert len(alive) == 3 * 4 + 2 * 2 + 3  # attention, two layers of experts, one dense FFN
    assert not [weight for weight in alive if weight() is not None]
    whole = load_model(moe_dir, torch.float32, CPU)
    quantize_model(whole, format)
    assert torch.equal(logits(model, moe_dir), logits(whole, moe_dir))


def test_buffers_follow_the_module_and_are_saved() -> None:
    """`to` moves them, a state dict has them; their integers and scales keep their dtypes."""
    experts = nn.ModuleList([nn.Linear(40, 6)])
    quantize_layers(experts, "int4")
    moved = experts.to("meta")[0]
    assert isinstance(moved, QuantizedLinear)
    assert moved.quantized.data.device.type == "meta"
    assert set(moved.state_dict()) == {"bias", "weight_data", "weight_scales"}


META = torch.device("meta")


@pytest.mark.parametrize("format", FORMATS)
def test_a_gpu_is_served_integers(moe_dir: Path, format: str) -> None:
    """The meta device stands for a GPU: it has no content and is not a CPU."""
    model = load_quantized_model(moe_dir, TorchBackend(META, torch.float32, format))
    assert sum(isinstance(module, QuantizedExperts) for module in model.modules()) == 2
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 3 * 4 + 3 + 1
    assert not any(isinstance(module, nn.Linear) for name, module in model.named_modules() if ".gate" not in name)
    assert all(module.backend.quantize == format for module in model.modules() if isinstance(module, QuantizedLinear))


def test_a_device_without_triton_refuses() -> None:
    with pytest.raises(ValueError, match="^quantize int8: Triton is not installed$"):
        on_device(META, torch.float32, "int8")
    assert type(on_device(META, torch.float32)) is TorchBackend


class Int2:
    """A format that the registry has and no back end runs: signs, in whole bytes."""

    name, bits, lowest, highest = "int2", 8, -1, 1

    def scales(self, groups: Tensor, limit: Tensor) -> list[Tensor]:
        return [limit]

    def to_bytes(self, integers: Tensor) -> Tensor:
        return integers

    def to_integers(self, data: Tensor) -> Tensor:
        return data


def test_a_format_of_ones_own(dense_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object, registered: loaders know it, and a back end that has no row for it says so."""
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))
    formats.register(Int2())
    stored = quantize_weights(normal(4, 64), "int2")
    assert stored.to_dtype(torch.float32).abs().unflatten(1, (-1, GROUP)).amax(dim=2).allclose(stored.scales)
    model = load_quantized_model(dense_dir, TorchBackend(CPU, torch.float32, "int2"))
    assert logits(model, dense_dir).isfinite().all()
    with pytest.raises(ValueError, match="quantize int2: the kernel does not know this format"):
        load_to_serve(dense_dir, "cpu", "auto", "int2")


def test_an_unknown_format_is_refused_by_name(dense_dir: Path) -> None:
    with pytest.raises(ValueError, match="quantize 'int3': supported: int8, int4"):
        load_to_serve(dense_dir, "cpu", "auto", "int3")
