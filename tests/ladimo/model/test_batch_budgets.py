"""Budgets of experts that a step's decoding tokens share: the rule, and the model under it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ladimo.checkpoint import load_model
from ladimo.model.config import MoeLayerConfig
from ladimo.model.cpu import build
from ladimo.model.cpu.native_step import NativeStep
from ladimo.model.inputs import RoutingTables
from ladimo.model.routing import apply_batch_budget, select_experts
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import VOCAB_SIZE
from tests.ladimo.stepping import Row, Stepper, make_tables

EXPERTS = 6
LAYER = MoeLayerConfig(EXPERTS, 2, 8)

subsets = st.none() | st.sets(st.integers(0, EXPERTS - 1), min_size=1).map(lambda found: tuple(sorted(found)))
rules = st.builds(
    LayerRule,
    top_k=st.integers(1, EXPERTS),
    mass=st.none() | st.floats(0.2, 1.0),
    relative_floor=st.just(0.0) | st.floats(0, 1),
    experts=subsets,
    batch_experts=st.none() | st.integers(1, EXPERTS),
)


def table(rule_list: list[LayerRule]) -> tuple[Tensor, Tensor]:
    """One token per rule: rows [T, len(RuleNumber)], masks [T, E]."""
    tables = RoutingTables.empty(len(rule_list) + 1, 1, EXPERTS, "cpu")
    for index, rule in enumerate(rule_list):
        tables.write(index + 1, *RoutingPolicy("p", "", (rule,)).to_rows(EXPERTS))
    return tables.rows[1:, 0], tables.allowed[1:, 0]


def chosen(ids: Tensor) -> list[set[int]]:
    return [{expert for expert in row if expert >= 0} for row in ids.tolist()]


def direct(rule_list: list[LayerRule], weights: Tensor, ids: Tensor, num_decode: int) -> list[set[int]]:
    """The masks in the words of the rule, token by token."""
    limited = [rule.batch_experts is not None and token < num_decode for token, rule in enumerate(rule_list)]
    free = set().union(*(found for found, budget in zip(chosen(ids), limited, strict=True) if not budget))
    total = [0.0] * EXPERTS
    for token, budget in enumerate(limited):
        for weight, expert in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            if budget and expert >= 0:
                total[expert] += weight
    masks = []
    for rule, budget in zip(rule_list, limited, strict=True):
        mask = set(range(EXPERTS) if rule.experts is None else rule.experts)
        if budget:
            costly = sorted(mask - free, key=lambda expert: (-total[expert], expert))
            mask = mask & free | set(costly[: rule.batch_experts])
        masks.append(mask)
    return masks


@settings(max_examples=200, deadline=None)
@given(rule_list=st.lists(rules, min_size=1, max_size=7), seed=st.integers(0, 2**16), data=st.data())
def test_masks_against_direct_implementation(rule_list: list[LayerRule], seed: int, data: st.DataObject) -> None:
    rows, allowed = table(rule_list)
    # Weights that add up exactly in any order.
    logits = torch.randn(len(rule_list), EXPERTS, generator=torch.Generator().manual_seed(seed)) * 2
    weights, ids = select_experts(logits, rows, allowed, LAYER)
    weights = (weights * 256).round() / 256
    num_decode = data.draw(st.integers(0, len(rule_list)))
    shared = apply_batch_budget(weights, ids, rows, allowed, num_decode)
    assert [set(row.nonzero().flatten().tolist()) for row in shared] == direct(rule_list, weights, ids, num_decode)


@settings(max_examples=100, deadline=None)
@given(budget=st.integers(1, EXPERTS), top_k=st.integers(1, EXPERTS), tokens=st.integers(1, 20), seed=st.integers(0, 2**16))
def test_a_batch_reads_no_more_experts_than_its_budget(budget: int, top_k: int, tokens: int, seed: int) -> None:
    """And a budget that holds them all changes nothing; every token still runs as many as the budget lets it."""
    rows, allowed = table([LayerRule(top_k, batch_experts=budget)] * tokens)
    logits = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed)) * 3
    weights, before = select_experts(logits, rows, allowed, LAYER)
    shared = apply_batch_budget(weights, before, rows, allowed, tokens)
    weights, after = select_experts(logits, rows, shared, LAYER)
    assert len(set().union(*chosen(after))) <= budget
    assert all(len(found) == min(top_k, budget) for found in chosen(after))
    assert torch.allclose(weights.sum(dim=1), torch.ones(tokens))
    if len(set().union(*chosen(before))) <= budget:
        assert torch.equal(after, before)


def test_experts_that_are_read_anyway_cost_nothing() -> None:
    """A prompt's token and one of a policy without a budget run experts 4 and 5; the budget of one goes to another."""
    rows, allowed = table([LayerRule(2, batch_experts=1), LayerRule(1, experts=(4,)), LayerRule(1, experts=(5,))])
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, 1.5, -9.0], [0.0] * 6, [0.0] * 6])
    weights, ids = select_experts(logits, rows, allowed, LAYER)
    shared = apply_batch_budget(weights, ids, rows, allowed, num_decode=2)
    assert shared[0].nonzero().flatten().tolist() == [0, 4, 5]
    assert chosen(select_experts(logits, rows, shared, LAYER)[1])[0] == {0, 4}
    assert torch.equal(shared[1:], allowed[1:])


def test_padded_rows_choose_nothing_and_have_no_say() -> None:
    rows, allowed = table([LayerRule(2, batch_experts=2)] * 3)
    rows, allowed = (torch.cat((tensor, torch.zeros_like(tensor[:2]))) for tensor in (rows, allowed))
    logits = torch.randn(5, EXPERTS, generator=torch.Generator().manual_seed(0))
    weights, ids = select_experts(logits, rows, allowed, LAYER)
    shared = apply_batch_budget(weights, ids, rows, allowed, 5)
    assert not shared[3:].any()
    assert torch.equal(shared[:3], apply_batch_budget(weights[:3], ids[:3], rows[:3], allowed[:3], 3))


def test_versions_of_policies_without_a_budget_stay() -> None:
    """The field is not in their JSON, so that a policy written before it existed has the same hash."""
    assert set(LayerRule(2).to_dict()) == {"top_k", "mass", "floor", "renormalize", "experts"}
    limited = RoutingPolicy("p", "", (LayerRule(2, batch_experts=3),))
    assert RoutingPolicy.from_dict(limited.to_dict()) == limited
    assert limited.version != RoutingPolicy("p", "", (LayerRule(2),)).version


def load(directory: Path) -> MoeTransformer:
    return load_model(directory, torch.float32, torch.device("cpu"))


def everywhere(model: MoeTransformer, rule: LayerRule) -> RoutingPolicy:
    return RoutingPolicy("p", "", tuple(None if layer is None else rule for layer in model.config.layers))


def prompt(index: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (20,), generator=torch.Generator().manual_seed(index)).tolist()


def run(model: MoeTransformer, native: NativeStep | None, policies: list[RoutingPolicy], budgets: bool) -> list[Tensor]:
    """Three prompts; they decode beside a fourth one's prompt; all four decode: logits and experts."""
    steps = Stepper(model, replace(make_tables(model, policies), batch_budgets=budgets))
    rows = [Row(prompt(index), 1 + index % len(policies)) for index in range(4)]
    out: list[Tensor] = []
    prompts = [(row, 12) for row in rows[:3]]
    for decode, prefill in (([], prompts), (rows[:3], [(rows[3], 15)]), (rows, []), (rows, [])):
        inputs = steps.inputs(decode, prefill)
        with torch.no_grad():
            out += [result for result in (native or model)(inputs, steps.kv_cache, steps.tables) if result is not None]
        for row, count in [*((row, 1) for row in decode), *prefill]:
            row.computed += count
    return out


def policies_of(model: MoeTransformer) -> list[RoutingPolicy]:
    rules = (LayerRule(2, batch_experts=1), LayerRule(3, batch_experts=2), LayerRule(1))
    return [everywhere(model, rule) for rule in rules]


@pytest.mark.skipif(build.library() is None, reason="there is no compiled CPU kernel here")
def test_the_compiled_step_shares_as_torch_does(moe_dir: Path) -> None:
    model = load(moe_dir)
    policies = policies_of(model)
    expected, found = run(model, None, policies, True), run(model, NativeStep(model, "float32", 2), policies, True)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    unlimited = run(model, None, policies, False)
    assert not torch.equal(unlimited[-1], expected[-1])


def test_budgets_count_only_where_the_engine_was_told_so(moe_dir: Path) -> None:
    model = load(moe_dir)
    without = [everywhere(model, LayerRule(top_k)) for top_k in (2, 3, 1)]
    for one, other in zip(run(model, None, policies_of(model), False), run(model, None, without, True), strict=True):
        assert torch.equal(one, other)


def test_a_prompt_does_not_see_the_budget(moe_dir: Path) -> None:
    """Its keys and values are the same whoever is in the batch, so that the prefix cache stays true."""
    model = load(moe_dir)
    logits = []
    for budgets in (False, True):
        steps = Stepper(model, replace(make_tables(model, policies_of(model)), batch_budgets=budgets))
        logits.append(steps.step(prefill=[(Row(prompt(0)), 20), (Row(prompt(1), 2), 20)]))
    for one, other in zip(*logits, strict=True):
        assert torch.equal(one, other)
