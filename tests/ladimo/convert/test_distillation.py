"""Split, losses, training and profile of a single layer."""

import pytest
import torch
from torch import Tensor

from ladimo.convert.distill.layerwise import balance_loss, distill_layer, learning_rate_factor
from ladimo.convert.ffn.expert_layer import full_rule, layer_error, route, run_experts
from ladimo.convert.ffn.layer_data import LayerData, target_variance
from ladimo.convert.ffn.split import contiguous_partition, split_ffn
from ladimo.convert.methods.ladimo import Ladimo
from ladimo.convert.policies.routing_profile import LayerProfile, profile_layer
from ladimo.convert.recipe import Recipe, TrainRecipe
from ladimo.model.config import MoeLayerConfig
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule
from tests.ladimo.convert.conftest import small_recipe


@pytest.fixture
def mlp() -> GatedMLP:
    torch.manual_seed(0)
    mlp = GatedMLP(32, 90)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return mlp.requires_grad_(False)


@pytest.fixture
def data(mlp: GatedMLP) -> LayerData:
    """Inputs in clusters, so that there is something for a router to learn."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(4, 32, generator=generator) * 2
    inputs = centres[torch.randint(4, (1200,), generator=generator)] + torch.randn(1200, 32, generator=generator) * 0.3
    targets = mlp(inputs)
    return LayerData(inputs[:1000], targets[:1000], inputs[1000:], targets[1000:])


def split(mlp: GatedMLP, data: LayerData, recipe: Recipe) -> ExpertLayer:
    return Ladimo().split(mlp, data, recipe, torch.Generator().manual_seed(0))


def fit(layer: ExpertLayer, data: LayerData, recipe: Recipe) -> list[float]:
    return [point.holdout for point in distill_layer(layer, data, recipe.train, torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("num_experts", [1, 4, 7, 9, 90])
def test_all_experts_with_weight_one_are_the_ffn(mlp: GatedMLP, data: LayerData, num_experts: int) -> None:
    partition = contiguous_partition(90, num_experts)
    config = MoeLayerConfig(num_experts, num_experts, partition.shape[1], expert_weight="one")
    layer = split_ffn(mlp, partition, config, {"weight": torch.zeros(num_experts, 32)})
    rule = LayerRule(top_k=num_experts, renormalize=False)
    _, topk_weights, topk_ids = route(layer, data.fit_inputs, rule)
    out = run_experts(layer, data.fit_inputs, topk_weights, topk_ids)
    torch.testing.assert_close(out, data.fit_targets, rtol=0, atol=1e-5 * data.fit_targets.abs().max().item())


def test_padded_neurons_stay_zero_in_training(mlp: GatedMLP, data: LayerData) -> None:
    layer = split(mlp, data, small_recipe())
    fit(layer, data, small_recipe())
    size = layer.config.moe_intermediate_size
    assert size == 23  # 92 places for 90 neurons
    assert not layer.experts.down_proj[-1, :, -2:].any()
    assert not layer.experts.gate_up_proj[-1, [size - 2, size - 1, 2 * size - 2, 2 * size - 1]].any()
    assert layer.experts.down_proj[-1, :, :-2].all()


def test_holdout_error_falls_in_training(mlp: GatedMLP, data: LayerData) -> None:
    layer = split(mlp, data, small_recipe())
    before = layer_error(layer, data.holdout_inputs, data.holdout_targets)
    curve = fit(layer, data, small_recipe(**{"train.steps": 200}))
    assert curve[-1] < 0.5 * before
    assert curve[-1] < curve[0]
    assert curve[-1] == pytest.approx(layer_error(layer, data.holdout_inputs, data.holdout_targets))


def test_training_is_reproducible(mlp: GatedMLP, data: LayerData) -> None:
    first, second = (split(mlp, data, small_recipe()) for _ in range(2))
    assert fit(first, data, small_recipe()) == fit(second, data, small_recipe())
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_output_scale(mlp: GatedMLP, data: LayerData) -> None:
    layers = {scale: split(mlp, data, small_recipe(**{"split.output_scale": scale})) for scale in ("none", "experts", "fit")}
    errors = {scale: layer_error(layer, data.fit_inputs, data.fit_targets) for scale, layer in layers.items()}
    torch.testing.assert_close(layers["experts"].experts.down_proj, 4 * layers["none"].experts.down_proj)
    assert errors["fit"] < min(errors["none"], errors["experts"])


def test_a_diverging_run_is_refused(mlp: GatedMLP, data: LayerData) -> None:
    with pytest.raises(ValueError, match="training diverged"):
        fit(split(mlp, data, small_recipe()), data, small_recipe(**{"train.expert_lr": 1e30}))


def test_more_experts_than_neurons_are_refused(mlp: GatedMLP, data: LayerData) -> None:
    with pytest.raises(ValueError, match="is 91, the FFN has 90 neurons"):
        split(mlp, data, small_recipe(**{"split.experts": 91}))


def test_balance_loss_is_k_when_even_and_grows_with_imbalance() -> None:
    even = torch.tensor([[0, 1], [2, 3]])
    uneven = torch.tensor([[0, 1], [0, 1]])
    assert balance_loss(torch.zeros(2, 4), even).item() == pytest.approx(2.0)
    logits = torch.tensor([[5.0, 5.0, 0.0, 0.0]] * 2)
    assert balance_loss(logits, uneven).item() > 3.9


def test_error_is_one_for_the_mean(mlp: GatedMLP, data: LayerData) -> None:
    mean = data.fit_targets.mean(dim=0)
    error = (data.fit_targets - mean).pow(2).mean().item() / target_variance(data.fit_targets)
    assert error == pytest.approx(1.0, rel=1e-4)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    recipe = TrainRecipe(steps=100, warmup=0.1)
    factors = [learning_rate_factor(step, recipe) for step in range(101)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert (max(factors), factors[100]) == (1.0, 0.0)


@pytest.mark.parametrize(
    "config",
    [
        MoeLayerConfig(4, 1, 23, score_norm_top_k=1),
        MoeLayerConfig(4, 2, 23, score_norm_top_k=2),
        MoeLayerConfig(4, 3, 23, score_norm_top_k=3),
        MoeLayerConfig(4, 3, 23),
        MoeLayerConfig(4, 4, 23, score_function="sigmoid", expert_weight="one"),
    ],
    ids=["k1", "k2", "k3", "softmax over all", "sigmoid, weight one"],
)
def test_profile_agrees_with_running_the_rules(mlp: GatedMLP, data: LayerData, config: MoeLayerConfig) -> None:
    """Every figure of a profile is what the rule really does, computed the plain way."""
    top_k = config.num_experts_per_tok
    layer = split_ffn(mlp, contiguous_partition(90, 4), config, {"weight": torch.randn(4, 32) * 0.2})
    layer.requires_grad_(False)
    inputs, targets = data.holdout_inputs, data.holdout_targets
    profile = profile_layer(layer, inputs, targets, taus=(0.77,))

    def run(rule: LayerRule) -> tuple[float, float]:
        _, topk_weights, topk_ids = route(layer, inputs, rule)
        out = run_experts(layer, inputs, topk_weights, topk_ids)
        error = (out - targets).pow(2).mean().item() / target_variance(targets)
        return error, (topk_ids >= 0).sum().item() / len(inputs)

    assert len(profile.by_top_k) == top_k
    assert 0.77 in [entry.rule.mass for entry in profile.by_tau]
    for entry in profile.by_top_k + profile.by_tau:
        error, experts = run(entry.rule)
        assert entry.error == pytest.approx(error, rel=1e-4, abs=1e-7)
        assert entry.experts_per_token == pytest.approx(experts)
        other = LayerRule(entry.rule.top_k, entry.rule.mass, renormalize=not entry.rule.renormalize)
        if entry.rule != full_rule(layer):
            assert error <= run(other)[0] + 1e-6
    assert profile.by_top_k[-1].error == pytest.approx(layer_error(layer, inputs, targets), rel=1e-4)
    assert profile.by_top_k[-1].rule == full_rule(layer)
    assert sum(profile.histogram) == len(inputs)
    assert sum(profile.load) == pytest.approx(1.0)
    assert LayerProfile.from_dict(profile.to_dict()) == profile


def test_dynamic_rule_is_the_papers_reading(mlp: GatedMLP, data: LayerData) -> None:
    """One expert at its original weight where w1 >= tau, else two that sum to one."""
    layer = split(mlp, data, small_recipe(**{"split.gate_std": 0.5}))
    logits, weights, ids = route(layer, data.fit_inputs, LayerRule(top_k=2, mass=0.8, renormalize=False))
    two: Tensor = logits.topk(2).values.softmax(dim=-1)
    alone = two[:, 0] >= 0.8
    assert 0 < alone.sum() < len(alone)
    torch.testing.assert_close(weights[:, 0], two[:, 0])
    torch.testing.assert_close(weights[:, 1], two[:, 1].masked_fill(alone, 0))
    assert torch.equal(ids[:, 1] < 0, alone)
