"""The methods: partitions are exact, routers beat chance, the control hits its budget, all of them survive a checkpoint."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import (
    FRONTIER,
    TensorReader,
    load_model,
    moe_config_json,
    read_config,
    read_json,
    stored_dtype,
    write_json,
    write_tensors,
)
from ladimo.convert.distill.layerwise import distill_layer
from ladimo.convert.distill.router import activation_mass
from ladimo.convert.ffn.expert_layer import full_rule, layer_error, route, run_experts
from ladimo.convert.ffn.hidden_channels import coactivation, neuron_statistics
from ladimo.convert.ffn.layer_data import LayerData, target_variance
from ladimo.convert.ffn.least_squares import RIDGES, solve_down
from ladimo.convert.ffn.split import contiguous_partition, split_ffn
from ladimo.convert.methods.cmoe import cluster, num_shared_experts
from ladimo.convert.methods.layerwise import LayerwiseMethod
from ladimo.convert.methods.registry import METHODS, get_method
from ladimo.convert.methods.static import StaticRecipe, static_width
from ladimo.convert.recipe import Recipe
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.config import ModelConfig, MoeLayerConfig, moe_layers_to_json
from ladimo.model.families import read_model_config
from ladimo.model.inputs import StepInputs
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule, RoutingPolicy
from tests.ladimo.convert.conftest import small_recipe
from tests.ladimo.stepping import make_tables

CPU = torch.device("cpu")

PARTITIONING = ("moefication", "cmoe")
RIVALS = (*PARTITIONING, "static")
GROUPS, HIDDEN, NEURONS = 4, 32, 88


@pytest.fixture(scope="module")
def planted() -> GatedMLP:
    """Neurons in GROUPS groups of 22 in shuffled order: those of a group fire together, on their own direction of the input."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(GROUPS).repeat(NEURONS // GROUPS)[torch.randperm(NEURONS, generator=generator)]
    directions = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator)).Q
    mlp = GatedMLP(HIDDEN, NEURONS).requires_grad_(False)
    for projection, first, spread in ((mlp.gate_proj, 0, 0.05), (mlp.up_proj, GROUPS, 0.05)):
        noise = spread * torch.randn(NEURONS, HIDDEN, generator=generator)
        projection.weight.copy_(directions[first + groups] + noise)
    mlp.down_proj.weight.copy_(torch.randn(HIDDEN, NEURONS, generator=generator) * 0.3)
    mlp.register_buffer("groups", groups)
    mlp.register_buffer("directions", directions)
    return mlp


@pytest.fixture(scope="module")
def data(planted: GatedMLP) -> LayerData:
    """Each token fires two of the groups."""
    generator = torch.Generator().manual_seed(1)
    directions = planted.get_buffer("directions")
    firing = torch.stack([torch.randperm(GROUPS, generator=generator)[:2] for _ in range(1200)])
    strength = 2 + torch.rand(1200, 2, generator=generator)
    inputs = torch.zeros(1200, HIDDEN)
    for place in range(2):
        inputs += strength[:, place, None] * (directions[firing[:, place]] + directions[GROUPS + firing[:, place]])
    inputs += 0.2 * torch.randn(1200, HIDDEN, generator=generator)
    targets = planted(inputs)
    return LayerData(inputs[:1000], targets[:1000], inputs[1000:], targets[1000:])


def layerwise(name: str) -> LayerwiseMethod:
    method = get_method(name)
    assert isinstance(method, LayerwiseMethod)
    return method


def split(method: str, mlp: GatedMLP, data: LayerData, recipe: Recipe) -> ExpertLayer:
    return layerwise(method).split(mlp, data, recipe, torch.Generator().manual_seed(0))


def recipe(**flags: object) -> Recipe:
    """Four experts of which two run; `static` keeps half."""
    return small_recipe(**{"static.kept": 0.5, "cmoe.shared": 0.0, "cmoe.channels": 20, **flags})


def error_under(layer: ExpertLayer, data: LayerData, chosen: torch.Tensor) -> float:
    """Holdout error when token t runs the experts chosen[t] with weight one."""
    out = run_experts(layer, data.holdout_inputs, torch.ones(chosen.shape), chosen)
    return (out - data.holdout_targets).pow(2).mean().item() / target_variance(data.holdout_targets)


@pytest.mark.parametrize("method", PARTITIONING)
@pytest.mark.parametrize(("experts", "neurons"), [(4, 88), (7, 88), (8, 90)])
def test_all_experts_with_weight_one_are_the_ffn(method: str, experts: int, neurons: int, data: LayerData) -> None:
    torch.manual_seed(experts)
    mlp = GatedMLP(HIDDEN, neurons).requires_grad_(False)
    layer = split(method, mlp, data, recipe(**{"split.experts": experts, "cmoe.shared": 0.5}))
    assert layer.config.num_experts == experts
    assert layer.config.moe_intermediate_size == -(-neurons // experts)
    _, weights, ids = route(layer, data.holdout_inputs, LayerRule(experts, renormalize=False))
    expected = mlp(data.holdout_inputs)
    out = run_experts(layer, data.holdout_inputs, weights, ids)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("method", PARTITIONING)
def test_neurons_that_fire_together_become_an_expert(method: str, planted: GatedMLP, data: LayerData) -> None:
    layer = split(method, planted, data, recipe())
    groups = planted.get_buffer("groups")
    for gate_up in layer.experts.gate_up_proj:
        rows = gate_up[: NEURONS // GROUPS]
        members = torch.cdist(rows, planted.gate_proj.weight).argmin(dim=1)
        assert len(groups[members].unique()) == 1


@pytest.mark.parametrize("method", PARTITIONING)
def test_routers_come_near_the_oracle(method: str, planted: GatedMLP, data: LayerData) -> None:
    """Two of four planted groups fire: chance leaves most of the variance, knowing the masses almost none."""
    settings = recipe(**{"train.steps": 200 if method == "moefication" else 0})
    layer = split(method, planted, data, settings)
    layerwise(method).fit(layer, data, settings, torch.Generator().manual_seed(0))
    chance = error_under(layer, data, torch.rand(200, GROUPS, generator=torch.Generator().manual_seed(2)).topk(2).indices)
    oracle = error_under(layer, data, activation_mass(layer, data.holdout_inputs).topk(2).indices)
    routed = layer_error(layer, data.holdout_inputs, data.holdout_targets)
    assert oracle < 0.05 < 0.5 < chance
    assert routed < oracle + 0.1 * (chance - oracle)


def test_moefication_leaves_experts_alone_and_trains_the_router(planted: GatedMLP, data: LayerData) -> None:
    layer = split("moefication", planted, data, recipe())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    curve = layerwise("moefication").fit(layer, data, recipe(), torch.Generator().manual_seed(0))
    after = layer.state_dict()
    assert {name for name in after if not torch.equal(before[name], after[name])} == {"gate.fc1.weight", "gate.fc2.weight"}
    assert len(curve) == 10
    assert curve[-1].holdout == layer_error(layer, data.holdout_inputs, data.holdout_targets)


def test_activation_mass_is_the_sum_over_neurons(planted: GatedMLP, data: LayerData) -> None:
    partition = contiguous_partition(NEURONS, 4)
    layer = split_ffn(planted, partition, MoeLayerConfig(4, 2, 22, expert_weight="one", router="none"), {})
    x = data.holdout_inputs
    hidden = (F.silu(planted.gate_proj(x)) * planted.up_proj(x)).abs()
    torch.testing.assert_close(activation_mass(layer, x), hidden.view(-1, 4, 22).sum(dim=2))


def test_cmoe_keeps_the_often_activated_always_on(planted: GatedMLP, data: LayerData) -> None:
    settings = recipe(**{"split.experts": 8, "split.top_k": 6, "cmoe.shared": 0.5})
    assert num_shared_experts(settings) == 3
    layer = split("cmoe", planted, data, settings)
    for top_k in (4, 6):
        _, weights, ids = route(layer, data.holdout_inputs, LayerRule(top_k, renormalize=False))
        assert (ids[:, :3].sort(dim=1).values == torch.arange(3)).all()
        assert (weights == 1).all()
    picked = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    counts = coactivation(planted, data.fit_inputs[picked], 20)
    labels, representatives = cluster(counts, 8, 3)
    often = counts.diagonal()
    assert often[labels < 3].min() >= often[labels >= 3].max()
    assert labels[representatives].tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_cmoe_with_no_and_with_only_shared_experts(shared: float, planted: GatedMLP, data: LayerData) -> None:
    settings = recipe(**{"cmoe.shared": shared, "split.top_k": 4})
    layer = split("cmoe", planted, data, settings)
    assert layer_error(layer, data.holdout_inputs, data.holdout_targets) < 1e-9
    assert f"S{int(4 * shared)}A{4 - int(4 * shared)}E4" in METHODS["cmoe"].describe(settings)


def test_cmoe_tuned_is_better_than_training_free_and_keeps_its_router(planted: GatedMLP, data: LayerData) -> None:
    torch.manual_seed(0)
    mlp = GatedMLP(HIDDEN, NEURONS).requires_grad_(False)
    targets = mlp(data.fit_inputs), mlp(data.holdout_inputs)
    hard = dataclasses.replace(data, fit_targets=targets[0], holdout_targets=targets[1])
    settings = recipe(**{"train.steps": 150, "cmoe.shared": 0.5})
    layer = split("cmoe", mlp, hard, settings)
    before = {name: value.clone() for name, value in layer.gate.state_dict().items()}
    free = layer_error(layer, hard.holdout_inputs, hard.holdout_targets)
    layerwise("cmoe").fit(layer, hard, settings, torch.Generator().manual_seed(0))
    assert layer_error(layer, hard.holdout_inputs, hard.holdout_targets) < 0.5 * free
    assert all(torch.equal(value, before[name]) for name, value in layer.gate.state_dict().items())


def test_training_free_is_free_of_training(planted: GatedMLP, data: LayerData) -> None:
    for method in RIVALS:
        settings = recipe(**{"train.steps": 0})
        layer = split(method, planted, data, settings)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        assert layerwise(method).fit(layer, data, settings, torch.Generator().manual_seed(0)) == []
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


# The control


def model(layers: int = 4, intermediate_size: int = 96) -> ModelConfig:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    return read_model_config({"model_type": "llama", **sizes, "num_attention_heads": 4})


@pytest.mark.parametrize("target", [1.0, 0.9, 0.8, 0.65])
@pytest.mark.parametrize("layers", ["auto", "all", "0,2-3"])
def test_static_hits_the_budget_within_a_neuron(target: float, layers: str) -> None:
    config = model()
    settings = Recipe(method="static", layers=layers, target_active=target)

    def cost(width: int) -> float:
        layer = MoeLayerConfig(1, 1, width, expert_weight="one", router="none")
        converted = tuple(layer if index in settings.candidate_layers(4) else None for index in range(4))
        return dataclasses.replace(config, layers=converted).active_parameters_ratio((1.0,) * 4)

    width = static_width(config, settings)
    assert cost(width) <= target + 1e-9
    assert width == 96 or cost(width + 1) > target
    resolved = METHODS["static"].resolve(settings, config, CPU)
    assert round(resolved.section(StaticRecipe).kept * 96) == width
    assert METHODS["static"].resolve(resolved, config, CPU) == resolved


def test_static_refuses_a_budget_out_of_reach() -> None:
    with pytest.raises(ValueError, match=r"target_active: is 0.3, pruning these layers cannot go below 0\.\d+"):
        METHODS["static"].resolve(Recipe(method="static", layers="0", target_active=0.3), model(), CPU)


def test_static_keeps_the_neurons_that_matter(planted: GatedMLP, data: LayerData) -> None:
    layer = split("static", planted, data, recipe(**{"static.kept": 0.25, "static.resolve": False}))
    kept = neuron_statistics(planted, data.fit_inputs).importance.topk(22).indices.sort().values
    assert torch.equal(layer.experts.gate_up_proj[0], torch.cat((planted.gate_proj.weight[kept], planted.up_proj.weight[kept])))
    assert torch.equal(layer.experts.down_proj[0], planted.down_proj.weight[:, kept])
    assert not list(layer.gate.parameters())


def test_resolved_down_proj_lowers_the_holdout_error(data: LayerData) -> None:
    torch.manual_seed(0)
    mlp = GatedMLP(HIDDEN, NEURONS).requires_grad_(False)
    hard = dataclasses.replace(data, fit_targets=mlp(data.fit_inputs), holdout_targets=mlp(data.holdout_inputs))
    variants: list[dict[str, object]] = [{}, {"static.resolve": False}]
    variants += [{"static.ridge": ridge} for ridge in (1e9, *RIDGES)]
    errors = [
        layer_error(split("static", mlp, hard, recipe(**flags)), hard.holdout_inputs, hard.holdout_targets)
        for flags in variants
    ]
    chosen, pruned, stiff, *fixed = errors
    assert chosen < 0.7 * pruned
    assert stiff == pytest.approx(pruned, rel=1e-3)
    assert chosen == pytest.approx(min(fixed), rel=1e-5)


def test_down_proj_of_all_neurons_stays(planted: GatedMLP, data: LayerData) -> None:
    """With nothing pruned there is nothing to repair; nor do channels that never fire break the solution."""
    mlp = GatedMLP(HIDDEN, NEURONS).requires_grad_(False)
    mlp.load_state_dict({name: value for name, value in planted.state_dict().items() if "proj" in name})
    mlp.gate_proj.weight[:3] = 0.0
    targets = mlp(data.fit_inputs)
    whole = LayerData(data.fit_inputs, targets, data.holdout_inputs, mlp(data.holdout_inputs))
    solved, _ = solve_down(mlp, torch.arange(NEURONS), whole, 0.0)
    torch.testing.assert_close(solved, mlp.down_proj.weight, rtol=0, atol=1e-4)


def test_static_distilled_is_better_than_resolved(data: LayerData) -> None:
    torch.manual_seed(0)
    mlp = GatedMLP(HIDDEN, NEURONS).requires_grad_(False)
    hard = dataclasses.replace(data, fit_targets=mlp(data.fit_inputs), holdout_targets=mlp(data.holdout_inputs))
    settings = recipe(**{"train.steps": 200})
    layer = split("static", mlp, hard, settings)
    before = layer_error(layer, hard.holdout_inputs, hard.holdout_targets)
    curve = layerwise("static").fit(layer, hard, settings, torch.Generator().manual_seed(0))
    assert curve[-1].holdout < 0.8 * before


# What the methods share


def test_training_under_several_rules_serves_them_all(planted: GatedMLP, data: LayerData) -> None:
    """Trained for two experts only, one is poor; trained for one and two, one is better."""
    rules = [LayerRule(count, renormalize=False) for count in (1, 2)]
    errors = []
    for trained in (rules[1:], rules):
        settings = recipe(**{"train.steps": 200})
        layer = split("cmoe", planted, data, settings)
        distill_layer(layer, data, settings.train, torch.Generator().manual_seed(0), trained)
        _, _, ids = route(layer, data.holdout_inputs, rules[0])
        errors.append(error_under(layer, data, ids))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("method", RIVALS)
def test_results_are_reproducible(method: str, planted: GatedMLP, data: LayerData) -> None:
    layers = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        layer = layerwise(method).split(planted, data, recipe(), generator)
        layerwise(method).fit(layer, data, recipe(), generator)
        layers.append(layer.state_dict())
    assert all(torch.equal(layers[0][name], layers[1][name]) for name in layers[0])


@pytest.mark.parametrize("method", PARTITIONING)
def test_more_experts_than_neurons_are_refused(method: str, planted: GatedMLP, data: LayerData) -> None:
    with pytest.raises(ValueError, match="split.experts: is 89, the FFN has 88 neurons"):
        split(method, planted, data, recipe(**{"split.experts": 89}))


@pytest.mark.parametrize("method", RIVALS)
@torch.no_grad()
def test_a_converted_model_reloads_everywhere(method: str, source: Path, tmp_path: Path) -> None:
    """Every layer through split and fit, written as a checkpoint: our loader and transformers' give the same logits."""
    dense = StreamedModel(source, torch.device("cpu"))
    settings = METHODS[method].resolve(small_recipe(**{"train.steps": 5, "target_active": 0.7}), dense.config, CPU)
    blocks = torch.randint(256, (30, 32), generator=torch.Generator().manual_seed(0))
    tensors, layers = {name: dense.reader.get(name) for name in dense.reader.files if ".mlp." not in name}, []
    for index, mlp, inputs, targets in dense.ffn_data(blocks, range(3)):
        data = LayerData(inputs[:800], targets[:800], inputs[800:], targets[800:])
        generator = torch.Generator().manual_seed(index)
        layer = layerwise(method).split(mlp, data, settings, generator)
        with torch.enable_grad():
            layerwise(method).fit(layer, data, settings, generator)
        tensors |= {f"model.layers.{index}.mlp.{name}": value.detach() for name, value in layer.state_dict().items()}
        layers.append(layer.config)
        assert full_rule(layer) == LayerRule.full(layer.config)
    write_json(tmp_path / "config.json", moe_config_json(read_json(source / "config.json"), moe_layers_to_json(tuple(layers))))
    write_tensors(tmp_path, iter(tensors.items()))
    assert not (tmp_path / FRONTIER).exists() and stored_dtype(tmp_path) == torch.float32

    config = read_config(tmp_path)
    stored = sum(TensorReader(tmp_path).get(name).numel() for name in tensors if ".mlp." in name)
    whole = config.active_parameters_ratio(tuple(float(layer.num_experts) for layer in layers)) * config.dense_parameters
    others = sum(tensors[name].numel() for name in tensors if ".mlp." not in name and "embed" not in name and "lm_" not in name)
    assert whole == pytest.approx(stored + others)
    ours = load_model(tmp_path, torch.float32, torch.device("cpu"))
    policy = RoutingPolicy("full", "", tuple(LayerRule.full(layer) for layer in layers))
    logits = ours(StepInputs.whole_sequences(blocks[:2]), None, make_tables(ours, [policy])).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(theirs(blocks[:2]).logits.flatten(0, 1), logits, rtol=0, atol=1e-4)
