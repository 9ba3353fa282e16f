"""Weights laid out for serving compute what they did before."""

from pathlib import Path

import pytest
import torch

from ladimo.checkpoint import load_model, read_policies
from ladimo.model.attention.layer import Attention
from ladimo.model.inputs import StepInputs
from ladimo.model.quantization.layers import quantize_model
from tests.factories import make_dense, make_moe
from tests.ladimo.model.families.test_families import FAMILIES
from tests.ladimo.stepping import make_tables

CPU = torch.device("cpu")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_joined_projections(family: str, tmp_path: Path) -> None:
    """One product for queries, keys and values: with biases, norms of heads, partial rotary embedding, fused files."""
    directory = make_dense(tmp_path, **FAMILIES[family])
    model = load_model(directory, torch.float32, CPU)
    inputs, tables = StepInputs.whole_sequences(torch.arange(60).view(2, 30)), make_tables(model, [])
    expected = model(inputs, None, tables).logits
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    assert layers
    for layer in layers:
        layer.join_projections()
        assert layer.joined is not None
        weight = layer.joined[0]
        assert layer.q_proj.weight.data_ptr() == weight.data_ptr()  # in memory once
        layer.join_projections()
        assert layer.joined[0] is weight  # a captured graph may read it
    torch.testing.assert_close(model(inputs, None, tables).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_integer_projections_stay_apart(tmp_path: Path) -> None:
    directory = make_moe(tmp_path)
    model = load_model(directory, torch.float32, CPU)
    quantize_model(model, "int8")
    inputs = StepInputs.whole_sequences(torch.arange(20).view(1, 20), 1)
    tables = make_tables(model, [*read_policies(directory, model.config).values()])
    expected = model(inputs, None, tables).logits
    for module in model.modules():
        if isinstance(module, Attention):
            module.join_projections()
            assert module.joined is None
    assert torch.equal(model(inputs, None, tables).logits, expected)
