"""Method elastic: nested widths of a layer, budgets of a model, the whole conversion."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import read_config, read_frontier, read_json, read_policies
from ladimo.convert.distill.end_to_end import EndToEndOptions, Network, distill_end_to_end, hidden_error
from ladimo.convert.evaluate_checkpoint import evaluate_checkpoint
from ladimo.convert.ffn.expert_layer import layer_error
from ladimo.convert.ffn.hidden_channels import second_moments
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.ffn.neuron_ordering import expert_neurons, order_neurons, pruning_order, repair_error
from ladimo.convert.methods.elastic.method import Elastic
from ladimo.convert.methods.elastic.recipe import ElasticRecipe
from ladimo.convert.methods.elastic.substitutes import solved_substitute, with_substitutes
from ladimo.convert.pipeline import convert
from ladimo.convert.recipe import Recipe
from ladimo.convert.reprofile import reprofile
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.layers import GatedMLP
from ladimo.policy import LayerRule
from tests.factories import make_dense, rule_row
from tests.ladimo.convert.conftest import Made, killed, small_recipe
from tests.ladimo.convert.test_pipeline import full_logits, results

BUDGETS = [0.9, 0.8, 0.7, 0.6]


def elastic_recipe(**flags: object) -> Recipe:
    values = {"method": "elastic", "elastic.budgets": BUDGETS, "elastic.steps": 6, "elastic.batch_tokens": 128}
    return small_recipe(**{**values, "elastic.routed": 0.0, "elastic.routed_steps": 12, **flags})


@pytest.fixture(scope="module")
def elastic(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Read it, never change it."""
    out = tmp_path_factory.mktemp("elastic") / "moe"
    assert convert(str(source), out, elastic_recipe(), [text])
    return Made(source, text, out, elastic_recipe())


def ffn(neurons: int = 24, size: int = 16, seed: int = 0) -> tuple[GatedMLP, LayerData]:
    """An FFN whose last third of neurons are copies of the first third but for a factor, and data for it."""
    torch.manual_seed(seed)
    mlp = GatedMLP(size, neurons).requires_grad_(False)
    third = neurons // 3
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight.normal_(0, 1)
        projection.weight[-third:] = projection.weight[:third]
    inputs = torch.randn(600, size)
    outputs = mlp(inputs)
    return mlp, LayerData(inputs[:400], outputs[:400], inputs[400:], outputs[400:])


def test_copies_are_spared_first_and_repaired_without_loss() -> None:
    mlp, data = ffn()
    widths = order_neurons(mlp, data, 3, ridge=1e-8)
    kept = set(widths.order[:16].tolist())
    assert all(len(kept & {neuron, neuron + 16}) == 1 for neuron in range(8))  # one of each pair
    assert widths.errors[2] < 1e-4
    assert widths.errors[2] < widths.errors[1]
    assert widths.oracle_errors[1] > widths.errors[2]


def test_the_order_beats_the_neurons_own_size_and_a_random_one() -> None:
    mlp, data = ffn(seed=1)
    power, down = second_moments(mlp, data.fit_inputs), mlp.down_proj.weight.double()

    def loss(order: torch.Tensor) -> float:
        kept = order[:16]
        inner = power[kept][:, kept] + 1e-9 * torch.eye(16, dtype=torch.float64)
        repaired = torch.linalg.solve(inner, (down @ power[:, kept]).t()).t()
        return repair_error(power, down, kept, repaired)

    ours = loss(pruning_order(power, down, 1e-6))
    by_size = (power.diagonal() * down.square().sum(dim=0)).argsort(descending=True)
    assert ours < 0.1 * loss(by_size)
    assert ours < 0.1 * loss(torch.randperm(24))


@pytest.mark.parametrize("neurons", [24, 22])  # the second is no multiple of the experts
def test_all_experts_are_the_dense_ffn_and_a_substitute_is_its_repair(neurons: int) -> None:
    torch.manual_seed(0)
    mlp = GatedMLP(16, neurons).requires_grad_(False)
    inputs = torch.randn(500, 16)
    outputs = mlp(inputs)
    data = LayerData(inputs[:400], outputs[:400], inputs[400:], outputs[400:])
    widths = order_neurons(mlp, data, 4)
    layer = with_substitutes(mlp, widths.order, 4, [])
    assert layer_error(layer, data.holdout_inputs, data.holdout_targets) < 1e-10
    assert sorted(expert_neurons(widths.order, 4).flatten().tolist()[: 4 * 6])[-neurons:] == list(range(neurons))
    pair = solved_substitute(mlp, widths.order, 4, 2, widths.repairs[2])
    both = with_substitutes(mlp, widths.order, 4, [pair])
    assert (both.config.router, both.config.fixed_experts) == ("none", 0)
    assert (both.config.num_experts, both.config.substitutes, both.config.num_experts_per_tok) == (6, 2, 4)
    assert layer_error(both, data.holdout_inputs, data.holdout_targets) < 1e-10  # `full` leaves the substitutes out
    alone = with_substitutes(mlp, widths.order, 4, [pair])
    alone.config = dataclasses.replace(alone.config, substitutes=0)
    rows = rule_row(LayerRule(2, renormalize=False)).expand(100, -1)
    out, ids, _ = alone(data.holdout_inputs, rows, (torch.arange(6) >= 4).expand(100, -1))
    assert set(ids.flatten().tolist()) == {4, 5, -1}
    error = (out - data.holdout_targets).square().mean() / data.holdout_targets.var(dim=0, correction=0).mean()
    assert error.item() == pytest.approx(widths.errors[2], rel=1e-3)


def half_student(dense: StreamedModel) -> list[GatedMLP | None]:
    """The first 45 neurons of the first and the last of three layers."""
    narrow: list[GatedMLP | None] = []
    for index in range(3):
        mlp = dense.layer(index).mlp
        assert isinstance(mlp, GatedMLP)
        part = GatedMLP(32, 45)
        part.gate_proj.weight.data.copy_(mlp.gate_proj.weight[:45])
        part.up_proj.weight.data.copy_(mlp.up_proj.weight[:45])
        part.down_proj.weight.data.copy_(mlp.down_proj.weight[:, :45])
        narrow.append(part if index != 1 else None)
    return narrow


def test_distillation_brings_the_hidden_states_nearer_the_more_they_weigh(source: Path) -> None:
    dense = StreamedModel(source, torch.device("cpu"))
    network = Network(dense)
    blocks = torch.randint(256, (24, 32), generator=torch.Generator().manual_seed(0))
    target = network.run(blocks[16:], None)
    assert hidden_error(target, target).item() == 0.0
    assert hidden_error(network.run(blocks[16:], half_student(dense)), target).item() > 0.0
    errors = []
    for weight in (0.0, 10.0):
        student = half_student(dense)
        recipe = EndToEndOptions(30, 128, 0.03, weight)
        distill_end_to_end(dense, [student], blocks[:16], blocks[16:], recipe, torch.Generator().manual_seed(0))
        with torch.no_grad():
            errors.append(hidden_error(network.run(blocks[16:], student), target).item())
    assert errors[1] < 0.9 * errors[0]


def test_distillation_lowers_the_divergence_and_never_keeps_a_worse_student(source: Path) -> None:
    dense = StreamedModel(source, torch.device("cpu"))
    blocks = torch.randint(256, (24, 32), generator=torch.Generator().manual_seed(0))
    trained, spoiled = half_student(dense), half_student(dense)
    recipe = EndToEndOptions(30, 128, 0.03, 30.0)
    (curve,) = distill_end_to_end(dense, [trained], blocks[:16], blocks[16:], recipe, torch.Generator())
    assert curve[-1].holdout is not None
    assert curve[0].holdout is not None
    assert curve[-1].holdout < 0.9 * curve[0].holdout
    before = [part.down_proj.weight.clone() for part in spoiled if part is not None]
    wild = dataclasses.replace(recipe, steps=3, lr=30.0)
    (curve,) = distill_end_to_end(dense, [spoiled], blocks[:16], blocks[16:], wild, torch.Generator())
    assert curve[-1].holdout > curve[0].holdout  # type: ignore[operator]
    after = [part.down_proj.weight for part in spoiled if part is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_accuracy_one_is_the_dense_model(elastic: Made) -> None:
    config = read_config(elastic.out)
    assert len(config.moe_layer_indices) >= 2
    input_ids = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(elastic.dense, dtype=torch.float32)(input_ids).logits.flatten(0, 1)
        ours = AutoModelForCausalLM.from_pretrained(elastic.out, dtype=torch.float32)(input_ids).logits.flatten(0, 1)
    torch.testing.assert_close(full_logits(elastic.out, input_ids), theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    frontier = read_frontier(elastic.out)
    assert frontier is not None
    for batch in (1, 32):
        points = frontier.for_batch(batch)
        assert points.choose(1.0).perplexity_ratio <= 1.0 + 1e-4  # on random weights and text less may even be better
        ratios = [point.perplexity for point in points.points]
        assert ratios == sorted(ratios, reverse=True)


def test_budgets_are_met_and_named(elastic: Made) -> None:
    report = read_json(elastic.out / "report.json")
    ratios = {entry["policy"]: entry["active_parameters_ratio"] for entry in report["policies"]}
    budgets = {entry["policy"]: entry["target"] for entry in report["elastic"]["budgets"]}
    assert budgets == dict(zip(("quality", "balanced", "active-70", "fast"), BUDGETS, strict=True))
    for name, target in budgets.items():
        assert target - 0.1 < ratios[name] <= target
    policies = read_policies(elastic.out, read_config(elastic.out))
    for policy in policies.values():
        for rule in policy.layers:
            assert rule is None or (rule.experts is not None and rule.top_k == len(rule.experts))
    again = evaluate_checkpoint(str(elastic.out), elastic.text, "balanced")
    assert again["policies"][0]["active_parameters_ratio"] == pytest.approx(ratios["balanced"])


def test_the_perplexity_guard_gives_the_cheapest_policy_within_it(elastic: Made, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    convert(str(elastic.dense), out, elastic.recipe.override({"max_perplexity_ratio": 1.02}), [elastic.text])
    entries = {entry["policy"]: entry for entry in read_json(out / "report.json")["policies"]}
    guarded = entries["ratio-1.02"]
    assert guarded["perplexity_ratio"] <= 1.02
    assert guarded["active_parameters_ratio"] < 1
    named = [entries[name] for name in ("full", "quality", "balanced") if entries[name]["perplexity_ratio"] <= 1.02]
    assert guarded["active_parameters_ratio"] <= min(entry["active_parameters_ratio"] for entry in named)


@pytest.mark.parametrize(
    "pattern", ["*/layers/1/nested.safetensors", pytest.param("*/damage.json", marks=pytest.mark.long), "*/substitutes.json"]
)
def test_a_killed_run_resumes_to_the_same_result(elastic: Made, pattern: str, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    with killed.at(pattern):
        convert(str(elastic.dense), out, elastic.recipe, [elastic.text])
    assert not out.exists()
    assert convert(str(elastic.dense), out, elastic.recipe, [elastic.text])
    assert results(out) == results(elastic.out)


def test_profiling_again_keeps_budgets_and_measures_on_the_new_text(elastic: Made, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    shutil.copytree(elastic.out, out)
    other = tmp_path / "other.txt"
    other.write_text("".join(reversed(elastic.text.read_text())), encoding="utf-8")
    before = read_policies(out, read_config(out))
    report = reprofile(str(out), other)
    after = read_policies(out, read_config(out))
    for name in ("full", "quality", "balanced", "active-70", "fast"):
        assert after[name] == before[name]
    assert report["conditions"]["profiled"]["text"]["path"] == str(other)
    frontier = read_frontier(out)
    assert frontier is not None
    assert {point.policy for point in frontier.points} <= set(after)


def test_uniform_widths_are_the_same_in_every_layer(elastic: Made, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    convert(str(elastic.dense), out, elastic.recipe.override({"elastic.uniform": True, "elastic.steps": 0}), [elastic.text])
    for budget in read_json(out / "report.json")["elastic"]["budgets"]:
        assert len(set(budget["widths"])) == 1


def test_layers_may_be_left_dense(source: Path, text: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "moe", elastic_recipe(layers="0,2", **{"elastic.steps": 0}), [text])
    assert read_config(tmp_path / "moe").layers[1] is None
    policies = read_policies(tmp_path / "moe", read_config(tmp_path / "moe"))
    assert all(policy.layers[1] is None for policy in policies.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sources_stay_exact_at_the_top(dtype: torch.dtype, text: Path, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", dtype=dtype, max_position_embeddings=32, intermediate_size=90)
    out = tmp_path / "moe"
    convert(str(dense), out, elastic_recipe(**{"elastic.steps": 2}), [text])
    input_ids = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(input_ids).logits.flatten(0, 1)
    torch.testing.assert_close(full_logits(out, input_ids), theirs, rtol=1e-4, atol=1e-4)


def test_budgets_follow_from_the_target_and_wrong_ones_are_refused(source: Path) -> None:
    recipe = Elastic().resolve(Recipe(target_active=0.8), read_config(source), torch.device("cpu"))
    assert recipe.section(ElasticRecipe).budgets == [0.9, 0.8, 0.65]
    assert recipe.section(ElasticRecipe).steps == 320
    for wrong in ([0.9, 0.8], [0.8, 0.9, 0.5], [1.0, 0.8, 0.5], [1.1, 0.8, 0.5], [0.9, 0.8, 0.0]):
        with pytest.raises(ValueError, match=r"elastic\.budgets"):
            ElasticRecipe(budgets=wrong)
    for name, value in (("routed", 1.5), ("routed_steps", -1)):
        with pytest.raises(ValueError, match=rf"elastic\.{name}"):
            Recipe.from_dict({"elastic": {name: value}})
    assert Recipe.from_dict({"elastic": {"budgets": [0.9, 0.8, 0.5]}}).section(ElasticRecipe).budgets == [0.9, 0.8, 0.5]
    with pytest.raises(ValueError, match=r"elastic\.budgets\[1\]: must be of type float"):
        Recipe.from_dict({"elastic": {"budgets": [0.9, "x", 0.5]}})


def test_on_a_cpu_larger_models_and_more_budgets_get_fewer_steps(source: Path) -> None:
    small, recipe = read_config(source), ElasticRecipe(budgets=[0.9, 0.8, 0.65])

    def steps(times: int, budgets: int = 3, device: str = "cpu") -> int:
        some = dataclasses.replace(recipe, budgets=[0.9 - 0.05 * number for number in range(budgets)])
        config = dataclasses.replace(small, hidden_size=small.hidden_size * times, intermediate_size=8 * times)
        resolved = Elastic().resolve(Recipe().with_section(some), config, torch.device(device))
        return resolved.section(ElasticRecipe).steps

    by_size = [steps(times) for times in (1, 16, 24, 32, 64)]
    assert by_size[0] == 320 and by_size[-1] == 40
    assert by_size == sorted(by_size, reverse=True) and len(set(by_size)) > 2
    assert steps(24, 6) < steps(24)
    assert steps(64, device="cuda") == 320
    for own in (0, 7):
        asked = Recipe().with_section(dataclasses.replace(recipe, steps=own))
        assert Elastic().resolve(asked, small, torch.device("cpu")).section(ElasticRecipe).steps == own
