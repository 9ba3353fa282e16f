"""The routing rule against the contract's words, applied token by token in plain Python."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ladimo.model.config import ExpertWeight, MoeLayerConfig, ScoreFunction
from ladimo.model.inputs import MAX_DEFERRED_STEPS, MAX_DEFERRED_TOKENS, RoutingTables
from ladimo.model.routing import select_experts
from ladimo.policy import LayerRule, RoutingPolicy

EXPERTS = 6
TOLERANCE = 1e-5

score_functions = st.sampled_from(["softmax", "sigmoid"])
layers = st.builds(
    MoeLayerConfig,
    num_experts=st.just(EXPERTS),
    num_experts_per_tok=st.just(2),
    moe_intermediate_size=st.just(8),
    score_function=score_functions,
    score_norm_top_k=st.none() | st.integers(1, EXPERTS),
    expert_weight=st.sampled_from(["score", "one"]),
)
rules = st.builds(
    LayerRule,
    top_k=st.integers(1, EXPERTS + 2),
    mass=st.none() | st.sampled_from([0.0, 0.5, 0.8, 1.0]) | st.floats(0, 3),
    floor=st.just(0.0) | st.floats(0, 1),
    relative_floor=st.just(0.0) | st.floats(0, 1),
    renormalize=st.booleans(),
    experts=st.none() | st.sets(st.integers(0, EXPERTS - 1), min_size=1).map(lambda chosen: tuple(sorted(chosen))),
)
logits = st.lists(st.floats(-8, 8, width=32), min_size=EXPERTS, max_size=EXPERTS)
biases = st.none() | st.lists(st.floats(-2, 2, width=32), min_size=EXPERTS, max_size=EXPERTS)


def layer_of(score_function: ScoreFunction = "softmax", expert_weight: ExpertWeight = "score") -> MoeLayerConfig:
    return MoeLayerConfig(EXPERTS, 2, 8, score_function=score_function, expert_weight=expert_weight)


def direct(
    logits: list[float], bias: list[float] | None, rule: LayerRule, layer: MoeLayerConfig
) -> list[tuple[int, float]] | None:
    """The experts one token runs, best first, and their weights; None where rounding could decide either way."""
    allowed = range(EXPERTS) if rule.experts is None else rule.experts
    if layer.score_function == "softmax":
        total = math.fsum(math.exp(logits[expert]) for expert in allowed)
        scores = {expert: math.exp(logits[expert]) / total for expert in allowed}
    else:
        scores = {expert: 1 / (1 + math.exp(-logits[expert])) for expert in allowed}
    key = {expert: scores[expert] + (bias[expert] if bias else 0.0) for expert in allowed}
    ranked = sorted(allowed, key=lambda expert: -key[expert])
    if any(key[a] - key[b] < TOLERANCE for a, b in zip(ranked, ranked[1:], strict=False)):
        return None
    if layer.score_norm_top_k is not None:
        norm = math.fsum(scores[expert] for expert in ranked[: layer.score_norm_top_k])
        scores = {expert: score / norm for expert, score in scores.items()}
    kept: list[int] = []
    for rank, expert in enumerate(ranked):
        before = math.fsum(scores[better] for better in ranked[:rank])
        near_mass = rule.mass is not None and abs(before - rule.mass) < TOLERANCE * max(1, before)
        floors = (rule.floor, rule.relative_floor * scores[ranked[0]])
        near_floor = any(floor > 0 and abs(scores[expert] - floor) < TOLERANCE for floor in floors)
        if rank > 0 and (near_mass or near_floor):
            return None
        within = rank < rule.top_k and (rule.mass is None or before < rule.mass)
        if rank == 0 or (within and all(scores[expert] >= floor for floor in floors)):
            kept.append(expert)
    weights = [1.0 if layer.expert_weight == "one" else scores[expert] for expert in kept]
    if rule.renormalize:
        weights = [weight / math.fsum(weights) for weight in weights]
    return list(zip(kept, weights, strict=True))


def tables_of(rule_list: list[LayerRule]) -> RoutingTables:
    """One layer; the rules in rows 1, 2, ..."""
    tables = RoutingTables.empty(len(rule_list) + 1, 1, EXPERTS, "cpu")
    for index, rule in enumerate(rule_list):
        tables.write(index + 1, *RoutingPolicy("p", "", (rule,)).to_rows(EXPERTS))
    return tables


def select(
    tables: RoutingTables, policy_ids: list[int], router_logits: Tensor, layer: MoeLayerConfig, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return select_experts(router_logits, tables.rows[policy_ids, 0], tables.allowed[policy_ids, 0], layer, bias)


@settings(max_examples=120, deadline=None)
@given(layer=layers, tokens=st.lists(st.tuples(logits, rules), min_size=1, max_size=4), bias=biases)
def test_rule_against_direct_implementation(
    layer: MoeLayerConfig, tokens: list[tuple[list[float], LayerRule]], bias: list[float] | None
) -> None:
    """Several tokens, each under a rule of its own, in one call."""
    expected = [direct(logits, bias, rule, layer) for logits, rule in tokens]
    assume(None not in expected)
    tables = tables_of([rule for _, rule in tokens])
    weights, ids = select(
        tables,
        list(range(1, len(tokens) + 1)),
        torch.tensor([logits for logits, _ in tokens]),
        layer,
        None if bias is None else torch.tensor(bias),
    )
    assert weights.shape == ids.shape == (len(tokens), EXPERTS)
    for token, pairs in enumerate(expected):
        assert pairs is not None
        # With a selection bias a place behind a dropped one may be kept, so compare what is kept, in order.
        kept = ids[token] >= 0
        assert ids[token][kept].tolist() == [expert for expert, _ in pairs]
        assert weights[token][kept].tolist() == pytest.approx([weight for _, weight in pairs], rel=1e-5, abs=1e-5)
        assert (weights[token][~kept] == 0).all()


def test_direct_implementation_by_hand() -> None:
    """The oracle itself, on numbers worked out by hand: softmax scores 0.6, 0.3, 0.1 over the three experts allowed."""
    logits = [math.log(0.6), math.log(0.3), math.log(0.1), 50.0, 50.0, 50.0]
    allowed = (0, 1, 2)

    def kept(rule: LayerRule) -> list[tuple[int, float]]:
        return [(expert, round(weight, 6)) for expert, weight in direct(logits, None, rule, layer_of()) or []]

    assert kept(LayerRule(3, renormalize=False, experts=allowed)) == [(0, 0.6), (1, 0.3), (2, 0.1)]
    assert kept(LayerRule(2, experts=allowed)) == [(0, round(2 / 3, 6)), (1, round(1 / 3, 6))]
    assert kept(LayerRule(3, mass=0.5, renormalize=False, experts=allowed)) == [(0, 0.6)]
    assert kept(LayerRule(3, mass=0.7, renormalize=False, experts=allowed)) == [(0, 0.6), (1, 0.3)]
    assert kept(LayerRule(3, floor=0.2, renormalize=False, experts=allowed)) == [(0, 0.6), (1, 0.3)]
    assert kept(LayerRule(3, relative_floor=0.4, renormalize=False, experts=allowed)) == [(0, 0.6), (1, 0.3)]
    assert kept(LayerRule(3, relative_floor=1.0, renormalize=False, experts=allowed)) == [(0, 0.6)]
    assert kept(LayerRule(3, mass=0.0, floor=1.0, renormalize=False, experts=allowed)) == [(0, 0.6)]


@settings(max_examples=50, deadline=None)
@given(layer=layers, rule_list=st.lists(rules, min_size=2, max_size=5), seed=st.integers(0, 2**16))
def test_policies_of_one_call_equal_separate_calls(layer: MoeLayerConfig, rule_list: list[LayerRule], seed: int) -> None:
    tables = tables_of(rule_list)
    policy_ids = list(range(1, len(rule_list) + 1))
    router_logits = torch.randn(len(rule_list), EXPERTS, generator=torch.Generator().manual_seed(seed)) * 3
    weights, ids = select(tables, policy_ids, router_logits, layer)
    for token, policy in enumerate(policy_ids):
        alone = select(tables, [policy], router_logits[token, None], layer)
        # Torch's vector functions and their scalar rests may differ in a last bit.
        torch.testing.assert_close(weights[token, None], alone[0], rtol=0, atol=1e-6)
        assert torch.equal(ids[token, None], alone[1])


@pytest.mark.parametrize("expert_weight", ["score", "one"])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_padded_rows_keep_nothing(score_function: ScoreFunction, expert_weight: ExpertWeight) -> None:
    """Row 0 of the tables: zeros and an empty mask. Neither weights nor ids of its neighbours change."""
    tables = tables_of([LayerRule(2)])
    router_logits = torch.randn(3, EXPERTS, generator=torch.Generator().manual_seed(0))
    layer = layer_of(score_function, expert_weight)
    weights, ids = select(tables, [0, 1, 0], router_logits, layer)
    assert (ids[[0, 2]] == -1).all()
    assert (weights[[0, 2]] == 0).all()
    assert (ids[1] >= 0).sum() == 2
    assert torch.equal(weights[1, None], select(tables, [1], router_logits[1, None], layer)[0])


def test_writing_a_row_changes_the_outcome_in_place() -> None:
    tables = tables_of([LayerRule(4), LayerRule(3)])
    router_logits = torch.randn(8, EXPERTS, generator=torch.Generator().manual_seed(0))
    policy_ids = [1, 2] * 4
    addresses = (tables.rows.data_ptr(), tables.allowed.data_ptr())
    before = select(tables, policy_ids, router_logits, layer_of())
    tables.write(1, *RoutingPolicy("p", "", (LayerRule(1, experts=(2, 5)),)).to_rows(EXPERTS))
    after = select(tables, policy_ids, router_logits, layer_of())
    assert (tables.rows.data_ptr(), tables.allowed.data_ptr()) == addresses
    assert before[0].shape == after[0].shape
    assert (before[1] >= 0).sum(dim=1).tolist() == [4, 3] * 4
    assert (after[1] >= 0).sum(dim=1).tolist() == [1, 3] * 4
    assert set(after[1][0::2, 0].tolist()) == {2, 5}
    assert torch.equal(before[1][1::2], after[1][1::2])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), num_tokens=st.integers(1, 9))
def test_record_equals_a_recount(seed: int, num_tokens: int) -> None:
    """Two steps of three layers, the middle one dense; policy 0 is padding. The same when counting is put off."""
    deferred = RoutingTables.empty(num_policies=3, num_layers=3, num_experts=EXPERTS, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    tables = RoutingTables.empty(num_policies=3, num_layers=3, num_experts=EXPERTS, device="cpu")
    tokens_expected = torch.zeros(3, 3, EXPERTS, dtype=torch.int64)
    distinct_expected = torch.zeros(3, EXPERTS + 1, dtype=torch.int64)
    for _ in range(2):
        policy_ids = torch.randint(3, (num_tokens,), generator=generator)
        expert_ids = torch.rand(3, num_tokens, EXPERTS, generator=generator).argsort(dim=-1)
        kept = torch.randint(EXPERTS + 1, (3, num_tokens, 1), generator=generator) * (policy_ids > 0)[None, :, None]
        expert_ids = expert_ids.masked_fill(torch.arange(EXPERTS) >= kept, -1)
        expert_ids[1] = -1
        tables.record(expert_ids, policy_ids)
        deferred.defer(expert_ids, policy_ids)
        for layer in range(3):
            hit = set()
            for policy, ids in zip(policy_ids.tolist(), expert_ids[layer].tolist(), strict=True):
                for expert in ids:
                    if expert >= 0:
                        tokens_expected[policy, layer, expert] += 1
                        hit.add(expert)
            distinct_expected[layer, len(hit)] += 1
    assert torch.equal(tables.expert_tokens, tokens_expected)
    assert torch.equal(tables.distinct_experts, distinct_expected)
    assert (tables.expert_tokens[0] == 0).all()
    for _ in range(2):  # settling once more counts nothing twice
        deferred.settle()
        assert torch.equal(deferred.expert_tokens, tokens_expected)
        assert torch.equal(deferred.distinct_experts, distinct_expected)


def test_counting_is_put_off_for_so_long_only() -> None:
    tables = RoutingTables.empty(num_policies=2, num_layers=1, num_experts=2, device="cpu")
    one = torch.tensor([[[1, -1]]])
    for _ in range(MAX_DEFERRED_STEPS + 1):
        tables.defer(one, torch.tensor([1]))
    assert tables.expert_tokens[1].tolist() == [[0, MAX_DEFERRED_STEPS]]
    tables.defer(one.expand(1, MAX_DEFERRED_TOKENS, 2), torch.ones(MAX_DEFERRED_TOKENS, dtype=torch.int64))
    assert tables.expert_tokens[1].tolist() == [[0, MAX_DEFERRED_STEPS + 1 + MAX_DEFERRED_TOKENS]]
    assert tables.distinct_experts.tolist() == [[0, MAX_DEFERRED_STEPS + 2, 0]]


@settings(max_examples=50, deadline=None)
@given(tokens=st.lists(logits, min_size=1, max_size=4), ceiling=st.integers(1, EXPERTS))
def test_more_experts_never_fewer(tokens: list[list[float]], ceiling: int) -> None:
    """Raising top_k or mass never drops an expert that ran before: cost is monotone in both."""
    tables = tables_of([LayerRule(k, mass) for k in (ceiling, EXPERTS) for mass in (0.4, 0.9, None)])
    router_logits = torch.tensor(tokens)
    counts = [(select(tables, [row] * len(tokens), router_logits, layer_of())[1] >= 0).sum(dim=1) for row in range(1, 7)]
    for smaller, larger in [(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)]:
        assert (counts[smaller] <= counts[larger]).all()
