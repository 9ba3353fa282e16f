"""Models that were trained as Mixture-of-Experts are measured against themselves, and get a frontier."""

import json
from pathlib import Path

import pytest
import torch

from ladimo import cli
from ladimo.checkpoint import FRONTIER, load_model, read_config, read_frontier, read_json, read_policies, write_policy
from ladimo.convert.evaluate_checkpoint import evaluate_checkpoint
from ladimo.convert.report_files import PROFILE
from ladimo.convert.reprofile import reprofile
from ladimo.convert.stock.model import StockModel
from ladimo.convert.stock.profile import profile_stock, saliency
from ladimo.model.inputs import StepInputs
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import make_dense
from tests.ladimo.convert.conftest import make_text, small_recipe
from tests.ladimo.model.families.test_moe_families import MODELS
from tests.ladimo.stepping import make_tables

CPU = torch.device("cpu")
SHARED = MODELS["qwen2_moe"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A random model with a shared expert and a dense layer, profiled."""
    directory = make_dense(tmp_path_factory.mktemp("stock"), **SHARED)
    profile_stock(directory, text, CPU, small_recipe())
    return directory


def test_policies_are_measured_against_the_model_itself(profiled: Path) -> None:
    config, frontier = read_config(profiled), read_frontier(profiled)
    policies = read_policies(profiled, config)
    assert {"full", "quality", "balanced", "fast", "top-1", "top-2"} <= set(policies)
    assert policies["full"].layers == tuple(None if layer is None else LayerRule.full(layer) for layer in config.layers)
    assert frontier is not None
    points = frontier.for_batch(1).points
    assert {point.policy for point in points} <= set(policies)
    figures = {entry["policy"]: entry for entry in read_json(profiled / PROFILE)["policies"]}
    assert figures["full"]["perplexity_ratio"] == pytest.approx(1)
    assert figures["full"]["next_token_agreement"] == 1
    assert figures["full"]["active_parameters_ratio"] == pytest.approx(1)
    assert points[0].active_parameters_ratio < 0.9
    assert points[-1].perplexity <= figures["full"]["perplexity"]  # a random model may be better with fewer experts
    assert figures["top-1"]["perplexity_ratio"] != pytest.approx(1, abs=1e-3)


def test_floors_are_among_what_is_chosen_from(profiled: Path) -> None:
    policies = read_policies(profiled, read_config(profiled))
    assert any(rule and rule.relative_floor for policy in policies.values() for rule in policy.layers)


@torch.no_grad()
def test_the_streamed_model_is_the_model(profiled: Path) -> None:
    """Layer by layer under the rule None, it computes what the whole network computes under `full`."""
    blocks = torch.arange(48).view(2, 24)
    model = load_model(profiled, torch.float32, CPU)
    tables = make_tables(model, [read_policies(profiled, model.config)["full"]])
    expected = model(StepInputs.whole_sequences(blocks), None, tables).logits
    streamed = StockModel(profiled, CPU)
    hidden_states = streamed.embed(blocks)
    for index in range(streamed.config.num_hidden_layers):
        layer = streamed.layer(index)
        for rows, attended, inputs in streamed.attend(layer, hidden_states):
            hidden_states[rows] = (attended + layer.mlp(inputs)).view(hidden_states[rows].shape)
    assert (streamed.ends.logits(hidden_states.flatten(0, 1)) - expected).abs().max() < 1e-4


def test_evaluate_compares_with_the_model_itself(profiled: Path, text: Path) -> None:
    found = evaluate_checkpoint(str(profiled), text, tokens=400)
    by_policy = {entry["policy"]: entry for entry in found["policies"]}
    assert by_policy["full"]["perplexity"] == pytest.approx(found["dense"]["perplexity"])
    assert by_policy["full"]["kl"] == pytest.approx(0, abs=1e-6)
    assert by_policy["top-1"]["kl"] > 0.001


def test_the_command_lists_what_was_measured(profiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["policies", str(profiled), "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["policies"]}
    assert listed["top-1"]["figures"]["active_parameters_ratio"] < listed["full"]["figures"]["active_parameters_ratio"]


def test_a_second_profile_replaces_the_first_and_keeps_what_a_user_added(tmp_path: Path, text: Path) -> None:
    directory = make_dense(tmp_path / "stock", model_type="mixtral", num_local_experts=4)
    profile_stock(directory, text, CPU, small_recipe())
    full = read_policies(directory, read_config(directory))["full"]
    write_policy(directory, RoutingPolicy("mine", "", full.layers))
    profile_stock(directory, text, CPU, small_recipe(**{"policies.points": 0}))
    policies = read_policies(directory, read_config(directory))
    assert set(policies) == {"full", "quality", "balanced", "fast", "top-1", "mine"}
    assert (directory / FRONTIER).exists()


@torch.no_grad()
def test_saliency_is_weight_times_norm_of_the_output(profiled: Path) -> None:
    """Token by token, as REAP defines it. The shared expert does not count."""
    layer = StockModel(profiled, CPU).experts(0)
    inputs = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    sums, counts = torch.zeros(6), torch.zeros(6)
    for x in inputs:
        scores = (layer.gate.weight @ x).softmax(dim=0)
        for expert in scores.topk(3).indices:
            gate, up = (layer.experts.gate_up_proj[expert] @ x).chunk(2)
            out = layer.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            sums[expert] += scores[expert] * out.norm()
            counts[expert] += 1
    assert saliency(layer, inputs) == pytest.approx((sums / counts.clamp(min=1)).tolist(), rel=1e-4)
    assert [len(entry["saliency"]) for entry in read_json(profiled / PROFILE)["layers"]] == [6, 6]


def test_it_has_no_dense_source(profiled: Path, text: Path) -> None:
    with pytest.raises(ValueError, match="was not converted, so it has no dense source"):
        reprofile(str(profiled), text, dense=profiled)
