"""Method elastic on Phi-2, whose FFNs have no gate but biases."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import TensorReader, load_model, read_config, read_json, read_policies
from ladimo.convert.ffn.expert_layer import layer_error
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.ffn.neuron_ordering import order_neurons
from ladimo.convert.methods.elastic.substitutes import as_experts, as_ffn, solved_substitute, with_substitutes
from ladimo.convert.pipeline import convert
from ladimo.model.cpu import build
from ladimo.model.cpu.native_step import NativeStep
from ladimo.model.layers import GeluMLP
from tests.factories import make_dense
from tests.ladimo.convert.methods.test_elastic import elastic_recipe
from tests.ladimo.convert.methods.test_elastic_routed import ALWAYS, convert_routed
from tests.ladimo.convert.test_pipeline import full_logits
from tests.ladimo.native import Cached
from tests.ladimo.stepping import Row, Stepper, make_tables

CPU = torch.device("cpu")
IDS = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
WAYS: dict[str, dict[str, Any]] = {
    "solved": {"elastic.steps": 0},
    "end to end": {},
    "layer by layer": {"elastic.max_parameters": 1000},
    "routed": {"elastic.routed": 0.8, "elastic.routed_margin": ALWAYS, "elastic.budgets": [0.9, 0.85, 0.8]},
}


@torch.no_grad()
def test_copies_are_spared_and_the_output_bias_counts_once() -> None:
    """The last third of the neurons are copies of the first third but for a factor. 22 neurons are no multiple of 4 experts."""
    torch.manual_seed(0)
    mlp = GeluMLP(16, 22)
    mlp.up_proj.weight[-7:], mlp.up_proj.bias[-7:] = mlp.up_proj.weight[:7], mlp.up_proj.bias[:7]
    mlp.down_proj.bias.fill_(3.0)
    inputs = 3 * torch.randn(600, 16)
    data = LayerData(inputs[:400], mlp(inputs[:400]), inputs[400:], mlp(inputs[400:]))
    widths = order_neurons(mlp, data, 4, ridge=1e-8)
    assert widths.errors[3] < 1e-4 < widths.errors[2]
    weights = solved_substitute(mlp, widths.order, 4, 3, widths.repairs[3])
    narrow = as_ffn(weights, mlp)
    error = (narrow(data.holdout_inputs) - data.holdout_targets).square().mean() / data.holdout_targets.var(dim=0).mean()
    assert error.item() == pytest.approx(widths.errors[3], rel=0.05)
    assert all(torch.equal(weight, weights[name]) for name, weight in as_experts(narrow, 3).items())
    layer = with_substitutes(mlp, widths.order, 4, [weights])
    assert (layer.config.num_experts, layer.config.substitutes, layer.config.ffn_kind) == (7, 3, "gelu")
    assert layer_error(layer, data.holdout_inputs, data.holdout_targets) < 1e-10  # `full` is the FFN


@pytest.fixture(scope="module", params=WAYS)
def converted(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The dense model, the converted one, and the way of its training."""
    directory = tmp_path_factory.mktemp("phi2")
    fields: dict[str, Any] = {"num_key_value_heads": 4, "max_position_embeddings": 32, "intermediate_size": 90}
    dense, recipe = make_dense(directory / "dense", model_type="phi", **fields), elastic_recipe(**WAYS[request.param])
    if request.param == "routed":
        convert_routed(dense, directory / "moe", text, recipe, factor=1e6)
    else:
        assert convert(str(dense), directory / "moe", recipe, [text])
    return dense, directory / "moe", request.param


@torch.no_grad()
def test_full_is_the_dense_model_and_training_leaves_the_biases(converted: tuple[Path, Path, str]) -> None:
    dense, moe, way = converted
    theirs = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(IDS).logits.flatten(0, 1)
    torch.testing.assert_close(full_logits(moe, IDS), theirs, rtol=0, atol=1e-4)
    budgets = read_json(moe / "report.json")["elastic"]["budgets"]
    assert any(budget["routed"] for budget in budgets) == (way == "routed")
    source, own = TensorReader(dense), TensorReader(moe)
    for index in range(3):
        name = f"model.layers.{index}.mlp."
        assert torch.equal(own.get(f"{name}output_bias"), source.get(f"{name}fc2.bias"))
    for budget in budgets:
        errors = budget["layer_errors"].values()
        assert all(after <= before for before, after in errors)
        assert bool(budget["layer_errors"]) == (way == "layer by layer")


@torch.no_grad()
def test_every_policy_is_the_same_in_torch_in_transformers_and_in_the_compiled_step(
    converted: tuple[Path, Path, str],
) -> None:
    _, moe, _ = converted
    model = load_model(moe, torch.float32, CPU)
    policies = list(read_policies(moe, model.config).values())
    reference = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)
    steppers: list[Stepper] = [Stepper(model, make_tables(model, policies))]
    if build.library() is not None:
        steppers.append(Cached(model, NativeStep(model, "float32", 1), policies))
    ran = set()
    for number, policy in enumerate(policies, 1):
        reference.set_policy(policy.layers)
        expected = reference(IDS).logits
        ran.add(expected.sum().item())
        for steps in steppers:
            rows = [Row(tokens, number) for tokens in IDS.tolist()]
            found = [steps.step(prefill=[(row, 15) for row in rows])]
            found += [steps.step(decode=rows) for _ in range(5)]
            for sequence in range(2):
                ours = torch.cat([step[sequence] for step in found])
                assert (ours - expected[sequence]).abs().max() < 1e-4
    assert len(ran) >= 4  # policies differ
    assert {layer.ffn_kind for layer in read_config(moe).layers if layer is not None} == {"gelu"}
