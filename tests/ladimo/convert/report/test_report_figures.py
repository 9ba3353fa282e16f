"""What a report shows beside the conversion: initialisation, depth, and measurements read from files."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ladimo.checkpoint import write_json
from ladimo.convert.data.calibration import Encoder, evaluation_blocks
from ladimo.convert.evaluation.measure import measure
from ladimo.convert.ffn.expert_layer import full_rule
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.ffn.split import contiguous_partition, split_ffn
from ladimo.convert.methods.ladimo import Ladimo
from ladimo.convert.methods.report_figures import depth_curve, forget, initialisation_curves
from ladimo.convert.policies.candidates import ConvertedModel
from ladimo.convert.report.outside import read_comparison, read_throughput
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.config import MoeLayerConfig
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule
from tests.ladimo.convert.conftest import small_recipe

ENTRY: dict[str, Any] = {
    "method": "elastic",
    "tokens": 100_000,
    "target": 0.8,
    "active_parameters_ratio": 0.79,
    "perplexity_ratio": 1.02,
    "spread": 0.001,
    "seeds": 3,
}


@pytest.fixture(scope="module")
def model(source: Path) -> StreamedModel:
    return StreamedModel(source, torch.device("cpu"))


@pytest.fixture(scope="module")
def blocks(model: StreamedModel, text: Path) -> torch.Tensor:
    return evaluation_blocks(Encoder(model.directory, model.config), text, 2000)


@pytest.fixture(scope="module")
def data(model: StreamedModel, blocks: torch.Tensor) -> tuple[GatedMLP, LayerData]:
    _, mlp, inputs, targets = next(model.ffn_data(blocks, [1]))
    assert isinstance(mlp, GatedMLP)
    return mlp, LayerData(inputs[:-300], targets[:-300], inputs[-300:], targets[-300:])


def partition(model: StreamedModel, index: int) -> ExpertLayer:
    """An exact partition of the layer's FFN into 4 experts that count with one."""
    mlp = model.layer(index).mlp
    assert isinstance(mlp, GatedMLP)
    experts = contiguous_partition(mlp.gate_proj.out_features, 4)
    return split_ffn(mlp, experts, MoeLayerConfig(4, 4, experts.shape[1], expert_weight="one", router="none"), {})


def test_initialisation_compares_like_with_like(data: tuple[GatedMLP, LayerData]) -> None:
    recipe = small_recipe(method="ladimo")
    found = initialisation_curves(Ladimo(), *data, recipe, layer=1, steps=40)
    assert (found["layer"], found["steps"]) == (1, 40)
    split, random = found["curves"]["split"], found["curves"]["random"]
    assert [point["step"] for point in split] == [point["step"] for point in random]
    assert (split[0]["step"], split[-1]["step"]) == (0, 40)
    for curve in (split, random):
        assert curve[-1]["holdout"] < curve[0]["holdout"]
    assert split[-1]["holdout"] < random[-1]["holdout"]  # what the source has learned is worth something
    assert found == initialisation_curves(Ladimo(), *data, recipe, layer=1, steps=40)


def test_forgetting_keeps_scale_and_padding(data: tuple[GatedMLP, LayerData]) -> None:
    mlp, layer_data = data
    layer = Ladimo().split(mlp, layer_data, small_recipe(method="ladimo"), torch.Generator().manual_seed(0))
    layer.requires_grad_(False)
    before = [weight.clone() for weight in layer.experts.parameters()]
    gate = copy.deepcopy(layer.gate.state_dict())
    forget(layer, torch.Generator().manual_seed(0))
    for old, new in zip(before, layer.experts.parameters(), strict=True):
        assert torch.equal(old == 0, new == 0)
        assert new[new != 0].std().item() == pytest.approx(old[old != 0].std().item(), rel=0.05)
        assert torch.corrcoef(torch.stack((old.flatten(), new.flatten())))[0, 1].abs() < 0.1
    assert all(torch.equal(weight, gate[name]) for name, weight in layer.gate.state_dict().items())


def test_depth_is_measured_from_none_to_all(model: StreamedModel, blocks: torch.Tensor) -> None:
    layers = {index: partition(model, index) for index in range(3)}
    config = dataclasses.replace(model.config, layers=tuple(layer.config for layer in layers.values()))
    half = {index: LayerRule(top_k=2, renormalize=False, experts=(0, 1)) for index in layers}
    order = [2, 0, 1]
    found = depth_curve(ConvertedModel(model, layers.__getitem__, config), order, blocks, half)
    assert [entry["converted"] for entry in found] == [0, 1, 2, 3]
    assert [entry["layers"] for entry in found] == [[], [2], [0, 2], [0, 1, 2]]
    assert found[0]["perplexity_ratio"] == found[0]["next_token_agreement"] == found[0]["active_parameters_ratio"] == 1
    costs = [entry["active_parameters_ratio"] for entry in found]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == pytest.approx(config.active_parameters_ratio((2.0, 2.0, 2.0)))
    alone = (None, None, half[2])
    measured = measure(model, layers.__getitem__, blocks, [alone])[alone]
    assert found[1]["perplexity"] == pytest.approx(measured.perplexity, rel=1e-6)


def test_depth_under_full_rules_of_an_exact_partition_loses_nothing(model: StreamedModel, blocks: torch.Tensor) -> None:
    layers = {index: partition(model, index) for index in range(3)}
    assert full_rule(layers[0]).top_k == 4
    config = dataclasses.replace(model.config, layers=tuple(layer.config for layer in layers.values()))
    found = depth_curve(ConvertedModel(model, layers.__getitem__, config), [0, 1, 2], blocks)
    assert found[-1]["perplexity_ratio"] == pytest.approx(1, rel=1e-4)


def test_depth_of_many_layers_is_thinned_and_bounded(model: StreamedModel, blocks: torch.Tensor) -> None:
    layers = {index: partition(model, index) for index in range(3)}
    config = dataclasses.replace(model.config, layers=tuple(layer.config for layer in layers.values()))
    whole = depth_curve(ConvertedModel(model, layers.__getitem__, config), [0, 1, 2], blocks, points=2)
    assert [entry["converted"] for entry in whole] == [0, 3]
    one_block = 2 * blocks.shape[1] * config.hidden_size * 4
    small = depth_curve(ConvertedModel(model, layers.__getitem__, config), [0, 1, 2], blocks, points=2, pass_bytes=one_block)
    assert small == depth_curve(ConvertedModel(model, layers.__getitem__, config), [0, 1, 2], blocks[:1], points=2)
    assert small[0]["perplexity"] != whole[0]["perplexity"]


def test_a_comparison_is_read_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    write_json(file, {"benchmark": "x", "comparison": [{**ENTRY, "further": 1}]})
    assert read_comparison(file) == [ENTRY]
    write_json(file, [{**ENTRY, "target": 1}])
    assert read_comparison(file) == [{**ENTRY, "target": 1}]
    for wrong, message in (
        ({}, "comparison: must be a list with at least one entry"),
        ([], "comparison: must be a list with at least one entry"),
        ([ENTRY, 3], r"comparison\[1\]: must be a table of names and values, got 3"),
        ([{**ENTRY, "spread": None}], r"comparison\[0\]\.spread: must be of type float, got None"),
        ([{**ENTRY, "seeds": True}], r"comparison\[0\]\.seeds: must be of type int, got True"),
        ([{**ENTRY, "perplexity_ratio": -1.0}], r"comparison\[0\]\.perplexity_ratio: must be a number of at least 0, got -1"),
        ([{**ENTRY, "perplexity_ratio": float("nan")}], r"comparison\[0\]\.perplexity_ratio: must be a number of at least 0"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=f"bench.json: {message}"):
            read_comparison(file)


def test_throughput_is_the_decoding_of_the_bench(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    rows: list[dict[str, Any]] = [
        {"measure": "decode", "policy": "dense", "batch": 1, "tokens_per_second": 10.5, "lowest": 9.0},
        {"measure": "prefill", "policy": "dense", "batch": 1, "tokens_per_second": 900.0},
        {"policy": "fast", "batch": 8, "tokens_per_second": 20},
    ]
    write_json(file, {"device": "cpu", "gpu": None, "commit": "abc", "results": rows})
    assert read_throughput(file) == {
        "conditions": {"device": "cpu"},
        "results": [
            {"policy": "dense", "batch": 1, "tokens_per_second": 10.5},
            {"policy": "fast", "batch": 8, "tokens_per_second": 20},
        ],
    }
    write_json(file, {"results": [{"policy": "dense", "batch": 1}]})
    with pytest.raises(ValueError, match=r"results\[0\]\.tokens_per_second: is missing"):
        read_throughput(file)
