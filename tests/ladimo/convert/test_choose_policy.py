import dataclasses
import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ladimo.convert.evaluation.variants import Rules, distinct_experts, refined_rows
from ladimo.convert.policies.choose import (
    Option,
    best_rules,
    choose_layers,
    choose_rule,
    full_cost,
    interpolate,
    named_policies,
    spread,
)
from ladimo.convert.policies.descriptions import describe_rules, rule_name
from ladimo.convert.policies.knapsack import solve_knapsack
from ladimo.convert.policies.routing_profile import LayerProfile, profile_layer
from ladimo.convert.recipe import PolicyRecipe
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.families import read_model_config
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
    dense = read_model_config(raw)
    return dataclasses.replace(dense, layers=(MoeLayerConfig(4, top_k, 24, score_norm_top_k=top_k),) * layers)


def profile(gate_std: float, top_k: int = 2, seed: int = 0) -> LayerProfile:
    """Of a random layer: the larger gate_std, the surer the router."""
    torch.manual_seed(seed)
    layer = ExpertLayer(32, MoeLayerConfig(4, top_k, 24, score_norm_top_k=top_k)).requires_grad_(False)
    layer.gate.get_parameter("weight").normal_(0, gate_std)
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
    assert describe_rules((torn, None, mixed, torn), model(4)) == "TOP2 in 2 layers, DYN(0.8) in 1 layer"


def test_names_of_rules_say_their_limits() -> None:
    """Also of a mask that would be static without: fewer of its experts may run."""
    assert rule_name(LayerRule(2, experts=(1, 4))) == "2 fixed"
    assert rule_name(LayerRule(2, experts=(1, 4), relative_floor=0.3)) == "TOP2 relative_floor 0.3"
    assert rule_name(LayerRule(4, mass=0.8, floor=0.1)) == "DYN(0.8) floor 0.1"
    assert rule_name(LayerRule(4, batch_experts=3)) == "TOP4 batch_experts 3"


def test_policies_of_nested_models_say_what_each_part_reads() -> None:
    config = dataclasses.replace(model(2), nested_bits=(4, 8))
    eight, four = LayerRule(2, bits=8, attention_bits=8), LayerRule(2, bits=4, refine=1.5, attention_bits=8)
    head = LayerRule(1, bits=4, refine=8.0)
    assert describe_rules((LayerRule(2), LayerRule(2), LayerRule(1)), config) == "all bits everywhere"
    assert describe_rules((eight, eight, LayerRule(1, bits=8)), config) == "8 bits everywhere"
    assert describe_rules((eight, four, head), config) == (
        "FFN: 8 bits in 1 layer, 4 bits refined by token in 1 layer; attention: 8 bits in 2 layers; "
        "output head: 4 bits refined by token"
    )
    names = [rule_name(rule, nested=True) for rule in (LayerRule(2), eight, four)]
    assert names == ["all bits", "8 bits", "FFN 4 bits refined by token, attention 8 bits"]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_named_policies_fit_the_model_and_are_ordered_by_cost(top_k: int) -> None:
    config = model(3, top_k)
    profiles = {index: profile(std, top_k, seed=index) for index, std in enumerate((0.1, 0.3, 1.0))}
    chosen = named_policies(profiles, config, PolicyRecipe())
    costs = []
    for name in ("fast", "balanced", "quality", "full"):
        policy = RoutingPolicy(name, "", chosen[name])
        policy.validate(config)
        assert RoutingPolicy.from_dict(policy.to_dict()) == policy
        known = [profiles[index].by_top_k + profiles[index].by_tau for index in range(3)]
        experts = (
            next(entry for entry in entries if entry.rule == rule) for entries, rule in zip(known, policy.layers, strict=True)
        )
        costs.append(config.active_parameters_ratio(tuple(entry.experts_per_token for entry in experts)))
    assert costs == sorted(costs)
    assert costs[-1] == pytest.approx(full_cost(config))


def options(costs: list[list[float]], damages: list[list[float]]) -> dict[int, list[Option]]:
    """Layer i's option j runs costs[i][j] experts; its top_k tells it apart."""
    return {
        index: [Option(LayerRule(place + 1), *pair) for place, pair in enumerate(zip(*layer, strict=True))]
        for index, layer in enumerate(zip(costs, damages, strict=True))
    }


numbers = st.lists(st.floats(0, 8), min_size=2, max_size=4)


@given(st.lists(st.tuples(numbers, st.randoms(use_true_random=False)), min_size=1, max_size=4), st.floats(0.3, 1.2))
def test_the_solver_finds_the_best_choice_within_the_budget(
    layers: list[tuple[list[float], random.Random]], target: float
) -> None:
    costs = [layer for layer, _ in layers]
    damages = [[rng.random() for _ in layer] for layer, rng in layers]
    picked = solve_knapsack(costs, damages, target * 8)

    def total(picks: tuple[int, ...], values: list[list[float]]) -> float:
        return sum(layer[pick] for layer, pick in zip(values, picks, strict=True))

    every = list(itertools.product(*(range(len(layer)) for layer in costs)))
    slack = len(costs) * max(0.0, target * 8 - sum(map(min, costs))) / 4000 + 1e-6
    affordable = [total(picks, damages) for picks in every if total(picks, costs) <= target * 8 - slack]
    if total(picked, costs) > target * 8 + 1e-6:  # nothing fits: the cheapest
        assert total(picked, costs) == pytest.approx(min(total(picks, costs) for picks in every))
    else:
        assert total(picked, damages) <= min(affordable, default=math.inf) + 1e-9


def test_a_larger_budget_never_does_more_damage() -> None:
    config = model(3)
    rng = random.Random(0)
    known = options([[1, 2, 4]] * 3, [sorted((rng.random() for _ in range(3)), reverse=True) for _ in range(3)])

    def damage(rules: Rules) -> float:
        return sum(known[index][rule.top_k - 1].damage for index, rule in enumerate(rules) if rule)

    found = [damage(best_rules(known, config, target / 100)) for target in range(40, 125, 5)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1] == pytest.approx(sum(layer[2].damage for layer in known.values()))
    path = spread(known, config, 10)
    assert len(path) == len(set(path)) > 3


def test_damage_is_interpolated_between_what_was_measured() -> None:
    errors, damages = [0.1, 0.4], [0.01, 0.16]
    assert interpolate(errors, damages, 0.1) == pytest.approx(0.01)
    assert interpolate(errors, damages, 0.2) == pytest.approx(0.04)  # a straight line on logarithmic scales
    assert interpolate(errors, damages, 0.4) == pytest.approx(0.16)
    assert interpolate(errors, damages, 0.05) == pytest.approx(0.005)
    assert interpolate(errors, damages, 0.8) == pytest.approx(0.32)
    assert interpolate([0.2], [0.02], 0.1) == pytest.approx(0.01)


def test_refined_rows_are_counted_per_token_and_per_batch() -> None:
    """Tokens that refine the same rows read them once; tokens that refine different ones read all of them."""
    same = torch.zeros(64, 10, dtype=torch.bool)
    same[:, :3] = True
    assert refined_rows(same).tolist() == [3.0, 3.0]
    own = torch.eye(64, dtype=torch.bool)
    assert refined_rows(own).tolist() == [1.0, 32.0]
    assert refined_rows(own[:5]).tolist() == [1.0, 5.0]


def test_distinct_experts_are_counted_per_batch() -> None:
    ids = torch.tensor([[0, 1]] * 64 + [[2, 3]] * 64)
    one, both = torch.ones(128, dtype=torch.int64), torch.full((128,), 2)
    assert distinct_experts(ids[:64], one[:64], 4) == 1.0
    assert distinct_experts(ids[:64], both[:64], 4) == 2.0
    assert 1.0 < distinct_experts(ids, one, 4) <= 2.0  # a batch of 32 random tokens nearly always meets both kinds
    assert distinct_experts(ids[:5], both[:5], 4) == 2.0


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
