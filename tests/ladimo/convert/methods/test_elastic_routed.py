"""Method elastic with routed substitutes: what they learn, when they are kept, and that everything reads such a checkpoint."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import load_model, read_config, read_frontier, read_json, read_policies, write_json
from ladimo.convert.distill.end_to_end import EndToEndOptions, distill_end_to_end
from ladimo.convert.evaluate_checkpoint import evaluate_checkpoint
from ladimo.convert.ffn.expert_layer import layer_error
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.ffn.neuron_ordering import order_neurons
from ladimo.convert.methods.elastic.substitutes import (
    routed_counts,
    routed_layer,
    routed_substitute,
    solved_substitute,
    with_substitutes,
)
from ladimo.convert.pipeline import convert
from ladimo.convert.recipe import Recipe
from ladimo.convert.reprofile import reprofile
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.cpu import build
from ladimo.model.cpu.native_step import NativeStep
from ladimo.model.inputs import StepInputs
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule
from tests.ladimo.convert.conftest import Made, killed
from tests.ladimo.convert.methods.test_elastic import elastic_recipe
from tests.ladimo.convert.test_pipeline import full_logits, results
from tests.ladimo.stepping import Row, Stepper, make_tables

ALWAYS, NEVER = -1e6, 1.0  # margins at which routed plans are kept
RECIPE = elastic_recipe(**{"elastic.routed": 0.7, "elastic.routed_margin": ALWAYS})  # the last two of the four budgets
IDS = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))


def prepare(source: Path, out: Path, text: Path, recipe: Recipe, jobs: int = 1, factor: float = 100) -> None:
    """On random weights and words it is chance who wins. So the conversion is stopped when the damage is known, and goes on
    with a record in which fixed widths damage `factor` times as much: then the solver asks for routed layers."""
    with killed.at("*/plans.json"):
        convert(str(source), out, recipe, [text], jobs=jobs)
    file = out.with_name(f"{out.name}.partial") / "damage.json"
    record = read_json(file)
    for layer in record["damage"].values():
        layer.update({count: factor * kl for count, kl in layer.items()})
    write_json(file, record)


def convert_routed(source: Path, out: Path, text: Path, recipe: Recipe, jobs: int = 1, factor: float = 100) -> None:
    prepare(source, out, text, recipe, jobs, factor)
    assert convert(str(source), out, recipe, [text], jobs=jobs)


@pytest.fixture(scope="module")
def routed(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Read it, never change it."""
    out = tmp_path_factory.mktemp("routed") / "moe"
    convert_routed(source, out, text, RECIPE)
    return Made(source, text, out, RECIPE)


def clustered(size: int = 16, neurons: int = 16) -> tuple[GatedMLP, LayerData]:
    """An FFN whose four groups of neurons each answer to one of four kinds of inputs, and data for it."""
    torch.manual_seed(0)
    mlp = GatedMLP(size, neurons).requires_grad_(False)
    kind = torch.arange(neurons) * 4 // neurons
    mlp.gate_proj.weight.zero_()
    mlp.gate_proj.weight[:, :4] = torch.where(torch.arange(4) == kind[:, None], 1.0, -3.0)
    mlp.up_proj.weight.normal_()
    mlp.down_proj.weight.normal_()
    inputs = torch.randn(4000, size)
    inputs[:, :4] = 3 * torch.eye(4)[torch.randint(4, (4000,))]
    outputs = mlp(inputs)
    return mlp, LayerData(inputs[:3600], outputs[:3600], inputs[3600:], outputs[3600:])


def test_a_router_finds_what_no_fixed_choice_has() -> None:
    mlp, data = clustered()
    recipe = elastic_recipe()
    weights = routed_substitute(mlp, data, recipe, 300, torch.Generator().manual_seed(0))
    layer = routed_layer(mlp, 4, 2)
    layer.gate.load_state_dict({"weight": weights["gate"]})
    layer.experts.load_state_dict({name: weight for name, weight in weights.items() if name != "gate"})
    fixed = order_neurons(mlp, data, 4).errors[2]
    assert layer_error(layer, data.holdout_inputs, data.holdout_targets) < 0.2 * fixed
    first, again = (routed_substitute(mlp, data, recipe, 10, torch.Generator().manual_seed(0)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in weights)
    with pytest.raises(ValueError, match=r"split\.experts: is 4, the FFN has 3"):
        routed_substitute(GatedMLP(16, 3), data, recipe, 300, torch.Generator())


def test_one_layer_holds_the_partition_fixed_and_routed_substitutes() -> None:
    mlp, data = clustered()
    widths = order_neurons(mlp, data, 4)
    sets = [solved_substitute(mlp, widths.order, 4, count, widths.repairs[count]) for count in (3, 1)]
    learnt = routed_substitute(mlp, data, elastic_recipe(), 40, torch.Generator().manual_seed(0))
    layer = with_substitutes(mlp, widths.order, 4, sets, [learnt])
    config = layer.config
    assert (config.num_experts, config.num_experts_per_tok, config.substitutes, config.fixed_experts) == (12, 4, 8, 8)
    assert layer.gate.weight.shape == (4, 16)
    assert layer_error(layer, data.holdout_inputs, data.holdout_targets) < 1e-10  # `full` is the FFN
    plain = with_substitutes(mlp, widths.order, 4, sets)
    assert torch.equal(layer.experts.down_proj[:8], plain.experts.down_proj)
    assert plain.config.router == "none"
    assert routed_counts(8) == (2, 3, 4)
    assert routed_counts(3) == ()


def test_distillation_trains_router_and_experts(source: Path) -> None:
    dense = StreamedModel(source, torch.device("cpu"))
    blocks = torch.randint(256, (24, 32), generator=torch.Generator().manual_seed(0))
    mlp = dense.layer(1).mlp
    assert isinstance(mlp, GatedMLP)
    layer = routed_layer(mlp, 4, 2)
    layer.gate.load_state_dict({"weight": 0.1 * torch.randn(4, 32, generator=torch.Generator().manual_seed(1))})
    before = {name: weight.clone() for name, weight in layer.state_dict().items()}
    recipe = EndToEndOptions(30, 128, 0.03, 30.0)
    (curve,) = distill_end_to_end(dense, [[None, layer, None]], blocks[:16], blocks[16:], recipe, torch.Generator())
    assert curve[-1].holdout < 0.9 * curve[0].holdout  # type: ignore[operator]
    assert all(not torch.equal(weight, before[name]) for name, weight in layer.state_dict().items())


def test_accuracy_one_is_the_dense_model(routed: Made) -> None:
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(routed.dense, dtype=torch.float32)(IDS).logits.flatten(0, 1)
        ours = AutoModelForCausalLM.from_pretrained(routed.out, dtype=torch.float32)(IDS).logits.flatten(0, 1)
    torch.testing.assert_close(full_logits(routed.out, IDS), theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_budget_has_a_routed_and_a_fixed_policy(routed: Made) -> None:
    config = read_config(routed.out)
    policies = read_policies(routed.out, config)
    report = read_json(routed.out / "report.json")
    entries = {entry["policy"]: entry for entry in report["policies"]}
    budgets = {entry["policy"]: entry for entry in report["elastic"]["budgets"]}
    fixed = ("quality", "balanced", "active-70-fixed", "fast-fixed")
    assert list(budgets) == [*fixed, "active-70", "fast"]
    for name, budget in budgets.items():
        assert entries[name]["active_parameters_ratio"] <= budget["target"]
        routes = []
        for index, rule in enumerate(policies[name].layers):
            layer = config.layers[index]
            assert rule is not None and layer is not None and rule.experts is not None
            assert rule.top_k == budget["widths"][index]
            if len(rule.experts) > rule.top_k:
                routes.append(index)
                assert rule.renormalize and min(rule.experts) >= layer.fixed_experts
            else:
                assert not rule.renormalize and max(rule.experts) < layer.num_experts
        assert routes == budget["routed"]
        assert bool(routes) == (name not in fixed)
    owners = [  # no two policies share a substitute
        expert
        for name in budgets
        for rule in [policies[name].layers[2]]
        if rule
        for expert in rule.experts or ()
        if expert >= 4
    ]
    assert len(owners) == len(set(owners)) > 0
    assert "An r marks routed layers" in (routed.out / "report.md").read_text()


@pytest.mark.long
def test_frontiers_count_what_a_batch_reads(routed: Made) -> None:
    """A routed policy reads more experts in a batch of 32 than a fixed one of the same budget."""
    frontier = read_frontier(routed.out)
    assert frontier is not None and {point.batch for point in frontier.points} == {1, 32}
    evaluated = evaluate_checkpoint(str(routed.out), routed.text, "all")
    entries = {entry["policy"]: entry for entry in evaluated["policies"]}
    stored = {entry["policy"]: entry for entry in read_json(routed.out / "report.json")["policies"]}
    for name in ("fast", "fast-fixed"):
        assert entries[name]["active_parameters_ratio"] == pytest.approx(stored[name]["active_parameters_ratio"])
    fast, fixed = (read_policies(routed.out, read_config(routed.out))[name] for name in ("fast", "fast-fixed"))
    wide = [len(rule.experts or ()) for rule in fast.layers if rule]
    assert sum(wide) > sum(rule.top_k for rule in fixed.layers if rule)


@torch.no_grad()
def test_every_path_computes_the_same(routed: Made) -> None:
    """Ours, transformers' and the compiled step under the routed policy, each token with experts of its own."""
    model = load_model(routed.out, torch.float32, torch.device("cpu"))
    policy = read_policies(routed.out, model.config)["fast"]
    tables = make_tables(model, [policy])
    output = model(StepInputs.whole_sequences(IDS), None, tables)
    theirs = AutoModelForCausalLM.from_pretrained(routed.out, dtype=torch.float32, policy="fast")(IDS).logits.flatten(0, 1)
    torch.testing.assert_close(output.logits, theirs, rtol=1e-4, atol=1e-4)
    assert output.expert_ids is not None
    index = next(i for i, rule in enumerate(policy.layers) if rule is not None and len(rule.experts or ()) > rule.top_k)
    assert len(output.expert_ids[index, :, 0].unique()) > 1
    if build.library() is None:
        return
    native, steps = NativeStep(model, "float32", 1), Stepper(model, tables, 4, num_blocks=64)
    row = Row(IDS[0].tolist(), 1)
    inputs = steps.inputs(prefill=[(row, 20)])
    cache = KVCache(steps.kv_cache.k.clone(), steps.kv_cache.v.clone())
    expected = model(inputs, steps.kv_cache, tables)
    logits, ids, _ = native(inputs, cache, tables)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)
    assert expected.expert_ids is not None and ids is not None
    assert torch.equal(ids.sort(dim=-1).values, expected.expert_ids.sort(dim=-1).values)


def test_a_routed_plan_that_does_not_win_leaves_nothing(source: Path, text: Path, tmp_path: Path) -> None:
    convert_routed(source, tmp_path / "moe", text, RECIPE.override({"elastic.routed_margin": NEVER}))
    config = read_config(tmp_path / "moe")
    assert {layer.router for layer in config.layers if layer is not None} == {"none"}
    budgets = read_json(tmp_path / "moe" / "report.json")["elastic"]["budgets"]
    assert [budget["policy"] for budget in budgets] == ["quality", "balanced", "active-70", "fast"]
    assert not any(budget["routed"] for budget in budgets)


@pytest.mark.parametrize("flags", [{"elastic.max_parameters": 1000}, {"elastic.steps": 0}, {"elastic.uniform": True}])
def test_without_the_end_to_end_stage_nothing_is_routed(
    source: Path, text: Path, tmp_path: Path, flags: dict[str, object]
) -> None:
    convert_routed(source, tmp_path / "moe", text, RECIPE.override(flags))
    assert {layer.router for layer in read_config(tmp_path / "moe").layers if layer is not None} == {"none"}


@pytest.mark.parametrize(
    "pattern", ["*/substitutes.safetensors", pytest.param("*/layers/1/model.safetensors", marks=pytest.mark.long)]
)
def test_a_killed_run_resumes_to_the_same_result(routed: Made, pattern: str, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    prepare(routed.dense, out, routed.text, routed.recipe)
    with killed.at(pattern):
        convert(str(routed.dense), out, routed.recipe, [routed.text])
    assert not out.exists()
    assert convert(str(routed.dense), out, routed.recipe, [routed.text])
    assert results(out) == results(routed.out)


@pytest.mark.long
def test_jobs_share_the_layers(routed: Made, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    convert_routed(routed.dense, out, routed.text, routed.recipe, jobs=2)
    one, two = (read_json(path / "report.json") for path in (routed.out, out))
    for mine, theirs in zip(one["policies"], two["policies"], strict=True):
        assert mine["policy"] == theirs["policy"]
        assert mine["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-3)


def test_profiling_again_keeps_both_kinds(routed: Made, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    shutil.copytree(routed.out, out)
    other = tmp_path / "other.txt"
    other.write_text("".join(reversed(routed.text.read_text())), encoding="utf-8")
    before = read_policies(out, read_config(out))
    reprofile(str(out), other)
    after = read_policies(out, read_config(out))
    for name in ("full", "quality", "balanced", "active-70", "active-70-fixed", "fast", "fast-fixed"):
        assert after[name].layers == before[name].layers


def test_half_precision_stays_exact_at_the_top(routed: Made) -> None:
    model = AutoModelForCausalLM.from_pretrained(routed.out, dtype=torch.bfloat16)
    dense = AutoModelForCausalLM.from_pretrained(routed.dense, dtype=torch.bfloat16)
    layer, rule = model.model.layers[2].mlp, LayerRule.full(read_config(routed.out).layers[2])  # type: ignore[arg-type]
    assert isinstance(layer, ExpertLayer) and layer.rule == dataclasses.replace(rule, renormalize=False)
    inputs = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        ours, theirs = layer(inputs), dense.model.layers[2].mlp(inputs)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())
