"""The routing and counting kernels against their references."""

import pytest
import torch
from torch import Tensor

from ladimo.model.config import MoeLayerConfig, ScoreFunction
from ladimo.model.inputs import RoutingTables
from ladimo.model.routing import apply_batch_budget, select_experts
from ladimo.model.rule import RuleNumber
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import rule_row

pytest.importorskip("triton")
from ladimo.model.kernels import routing as kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # the interpreter's numpy, in unused lanes
]


def draw_rule(num_experts: int, generator: torch.Generator) -> LayerRule:
    def chance() -> bool:
        return bool(torch.rand((), generator=generator) < 0.5)

    def uniform() -> float:
        return torch.rand((), generator=generator).item()

    size = int(torch.randint(1, num_experts + 1, (), generator=generator))
    subset = tuple(sorted(torch.randperm(num_experts, generator=generator)[:size].tolist()))
    return LayerRule(
        top_k=int(torch.randint(1, num_experts + 1, (), generator=generator)),
        mass=uniform() * 1.5 if chance() else None,
        floor=uniform() / num_experts if chance() else 0.0,
        relative_floor=uniform() if chance() else 0.0,
        renormalize=chance(),
        experts=subset if chance() else None,
        batch_experts=int(torch.randint(1, num_experts + 1, (), generator=generator)) if chance() else None,
    )


# In the interpreter, a hundred experts take seconds.
@pytest.mark.parametrize(
    "seed",
    [
        *range(7),
        pytest.param(7, marks=pytest.mark.long),
        *range(8, 15),
        pytest.param(15, marks=pytest.mark.long),
        *range(16, 24),
    ],
)
def test_select_experts(seed: int, device: torch.device) -> None:
    """Every token under a rule of its own or padded, in a table with more layers and experts than this layer has."""
    generator = torch.Generator().manual_seed(seed)
    num_experts = (1, 2, 3, 5, 8, 17, 33, 100)[seed % 8]
    num_tokens = (1, 2, 7, 70)[seed % 4] if num_experts < 17 else 5
    layer = MoeLayerConfig(
        num_experts,
        1,
        8,
        score_function=("softmax", "sigmoid")[seed // 2 % 2],
        score_norm_top_k=None if seed % 3 else min(2, num_experts),
        expert_weight=("score", "one")[seed // 4 % 2],
    )
    tables = RoutingTables.empty(num_tokens + 1, 2, num_experts + 1, "cpu")
    for row in range(1, num_tokens + 1):
        rules = tuple(draw_rule(num_experts, generator) for _ in range(2))
        tables.write(row, *RoutingPolicy("p", "", rules).to_rows(num_experts + 1))
    policy_ids = torch.arange(1, num_tokens + 1) * (torch.rand(num_tokens, generator=generator) < 0.8)
    rows, allowed = (table.to(device) for table in tables.rules(policy_ids))
    rows, allowed = rows[:, 1], allowed[:, 1, :num_experts]
    logits = (torch.randn(num_tokens, num_experts, generator=generator) * 3).to(device)
    bias = torch.randn(num_experts, generator=generator).to(device) if seed % 2 else None
    expected_weights, expected_ids = select_experts(logits, rows, allowed, layer, bias)
    weights, ids = kernels.select_experts(logits, rows, allowed, layer, bias)
    assert ids.dtype == expected_ids.dtype
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)
    assert (ids[policy_ids == 0] == -1).all()
    num_decode = num_tokens * (seed % 3) // 2
    shared = kernels.apply_batch_budget(weights, ids, rows, allowed, num_decode)
    assert torch.equal(shared, apply_batch_budget(weights, ids, rows, allowed, num_decode))


def test_apply_batch_budget_of_several_tiles(device: torch.device) -> None:
    """More tokens than one tile holds; weights whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(0)
    rows = rule_row(LayerRule(2, renormalize=False, batch_experts=3)).repeat(70, 1)
    rows[::9, RuleNumber.BATCH_EXPERTS] = torch.inf
    ids = torch.rand(70, 8, generator=generator).argsort(dim=-1).masked_fill(torch.arange(8) >= 2, -1)
    ids[::9] = -1
    ids[60:] = -1
    weights = torch.randint(1, 9, (70, 8), generator=generator) / 8 * (ids >= 0)
    allowed = torch.rand(70, 8, generator=generator) < 0.7
    weights, ids, rows, allowed = (tensor.to(device) for tensor in (weights, ids, rows, allowed))
    shared = kernels.apply_batch_budget(weights, ids, rows, allowed, 60, tile=32)
    assert torch.equal(shared, apply_batch_budget(weights, ids, rows, allowed, 60))
    assert (shared.sum(dim=1)[1:60:9] <= 3).all() and (shared[61:] == allowed[61:]).all()


def test_ties_go_to_the_lower_expert(device: torch.device) -> None:
    rows = rule_row(LayerRule(2, renormalize=False))[None].to(device)
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0]], device=device)
    ids = kernels.select_experts(logits, rows, torch.ones(1, 4, dtype=torch.bool, device=device), MoeLayerConfig(4, 1, 8))[1]
    assert ids.tolist() == [[1, 2, -1, -1]]


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_hostile_logits_choose_real_experts_once(bad: float, score_function: ScoreFunction, device: torch.device) -> None:
    """Whatever the router says, ids stay experts of the layer, each at most once: the expert kernels index with them."""
    logits = torch.tensor([[bad, 1.0, bad, -1.0, 0.5], [bad] * 5], device=device)
    rows = rule_row(LayerRule(5)).repeat(2, 1).to(device)
    allowed = torch.tensor([[True, True, True, True, False]] * 2, device=device)
    layer = MoeLayerConfig(5, 2, 8, score_function=score_function)
    weights, ids = kernels.select_experts(logits, rows, allowed, layer)
    for row in ids.tolist():
        kept = [expert for expert in row if expert >= 0]
        assert sorted(kept) == [0, 1, 2, 3]
    assert weights.isfinite().all()


@pytest.mark.parametrize(("num_tokens", "tile"), [(1, 8192), (6, 8192), (150, 8192), (150, 64)])
def test_record(num_tokens: int, tile: int, device: torch.device) -> None:
    """Two steps of mixed policies, choices that one tile holds or not, a dense layer in the middle."""
    generator = torch.Generator().manual_seed(num_tokens)
    expected, counted = (RoutingTables.empty(4, 3, 5, device) for _ in range(2))
    for _ in range(2):
        policy_ids = torch.randint(4, (num_tokens,), generator=generator)
        ids: Tensor = torch.rand(3, num_tokens, 5, generator=generator).argsort(dim=-1)
        ids = ids.masked_fill((torch.rand(ids.shape, generator=generator) < 0.6) | (policy_ids == 0)[None, :, None], -1)
        ids[1] = -1
        ids, policy_ids = ids.to(device), policy_ids.to(device)
        expected.record(ids, policy_ids)
        kernels.record(ids, policy_ids, counted.expert_tokens, counted.distinct_experts, tile)
    assert torch.equal(counted.expert_tokens, expected.expert_tokens)
    assert torch.equal(counted.distinct_experts, expected.distinct_experts)
    assert counted.expert_tokens.sum() > 0 and (counted.expert_tokens[0] == 0).all()
