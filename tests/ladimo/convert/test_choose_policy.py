import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ladimo.convert.choose_policy import candidate_policies, choose_layers, choose_rule, full_cost, predicted_cost
from ladimo.convert.operating_points import describe_rules, rule_name
from ladimo.convert.profile import LayerProfile, profile_layer
from ladimo.convert.recipe import PolicyRecipe
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule, RoutingPolicy

TAUS = (0.9, 0.8, 0.5)


def model(layers: int, top_k: int = 2) -> ModelConfig:
    raw = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    dense = ModelConfig.from_dict(raw)
    return dataclasses.replace(dense, layers=(MoeLayerConfig(4, top_k, 24, score_norm_top_k=top_k),) * layers)


def profile(gate_std: float, top_k: int = 2, seed: int = 0) -> LayerProfile:
    """Of a random layer: the larger gate_std, the surer the router."""
    torch.manual_seed(seed)
    layer = ExpertLayer(32, MoeLayerConfig(4, top_k, 24, score_norm_top_k=top_k)).requires_grad_(False)
    layer.gate.weight.normal_(0, gate_std)
    layer.experts.gate_up_proj.normal_(0, 0.2)
    layer.experts.down_proj.normal_(0, 0.2)
    return profile_layer(layer, torch.randn(500, 32), torch.randn(500, 32), TAUS)


def test_sure_layers_run_one_expert_and_torn_layers_two() -> None:
    recipe = PolicyRecipe()
    sure, mixed, torn = (choose_rule(profile(std), 0.8, recipe) for std in (10.0, 0.3, 0.001))
    assert (sure.top_k, sure.mass) == (1, None)
    assert (mixed.top_k, mixed.mass) == (2, 0.8)
    assert torn == LayerRule(top_k=2)
    assert [rule_name(rule) for rule in (sure, mixed, torn, None)] == ["TOP1", "DYN(0.8)", "TOP2", "dense"]
    assert describe_rules((torn, None, mixed, torn)) == "TOP2 in 2 layers, DYN(0.8) in 1 layer"


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_policies_fit_the_model_and_are_ordered_by_cost(top_k: int) -> None:
    config = model(3, top_k)
    profiles = {index: profile(std, top_k, seed=index) for index, std in enumerate((0.1, 0.3, 1.0))}
    chosen = candidate_policies(profiles, config, PolicyRecipe())
    for name, rules in chosen.items():
        policy = RoutingPolicy(name, "", rules)
        policy.validate(config)
        assert RoutingPolicy.from_dict(policy.to_dict()) == policy
    costs = [predicted_cost(chosen[name], profiles, config) for name in ("fast", "balanced", "quality", "full")]
    assert costs == sorted(costs)
    assert costs[-1] == pytest.approx(full_cost(config))
    extra = [predicted_cost(rules, profiles, config) for name, rules in chosen.items() if name.startswith("mass-")]
    assert len(extra) >= (3 if top_k > 1 else 0)
    assert all(cost <= costs[-1] for cost in extra)


@given(
    st.dictionaries(st.integers(0, 8), st.floats(1, 100), min_size=1),
    st.floats(0.05, 1.0),
    st.floats(0.01, 0.2),
)
def test_layers_are_converted_least_damaging_first(damage: dict[int, float], target: float, saving: float) -> None:
    chosen = choose_layers(damage, dict.fromkeys(damage, saving), target)
    rest = set(damage) - set(chosen)
    assert chosen
    assert all(damage[layer] <= damage[other] for layer in chosen for other in rest)
    assert 1 - saving * len(chosen) <= target + 1e-9 or not rest
    assert len(chosen) == 1 or 1 - saving * (len(chosen) - 1) > target - 1e-9
