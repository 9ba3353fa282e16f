"""The policy table: rows are shared, held, reused, and nothing that was counted is ever lost."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladimo.model.rule import RuleNumber
from ladimo.policy import LayerRule, RoutingPolicy
from server.engine.messages import PolicyTableFull
from server.engine.policy_table import NONE_ROW, PolicyTable
from tests.server.fakes import FAKE_CONFIG, fake_policy


def make_table(num_policies: int = 3) -> PolicyTable:
    return PolicyTable(FAKE_CONFIG, num_policies + 1, torch.device("cpu"))


def test_equal_policies_share_a_row_and_writing_keeps_addresses() -> None:
    table = make_table()
    addresses = (table.tables.rows.data_ptr(), table.tables.allowed.data_ptr(), table.tables.expert_tokens.data_ptr())
    first, again, other = (
        acquire(table, fake_policy("a")),
        acquire(table, fake_policy("a")),
        acquire(table, fake_policy("b", 1)),
    )
    assert first == again != other
    assert NONE_ROW not in (first, other)
    assert table.tables.rows[first, :-1, RuleNumber.TOP_K].tolist() == [2.0, 0.0, 2.0]
    assert table.tables.rows[other, :-1, RuleNumber.TOP_K].tolist() == [1.0, 0.0, 1.0]
    assert not table.tables.rows[NONE_ROW].any()
    now = (table.tables.rows.data_ptr(), table.tables.allowed.data_ptr(), table.tables.expert_tokens.data_ptr())
    assert now == addresses


def test_same_name_with_other_content_is_another_row() -> None:
    table = make_table()
    assert table.acquire([fake_policy("a", 1)]) != table.acquire([fake_policy("a", 2)])


def acquire(table: PolicyTable, policy: RoutingPolicy) -> int:
    rows = table.acquire([policy])
    assert rows is not None
    return rows[0]


def test_full_table_has_no_row_until_one_is_released() -> None:
    table = make_table(2)
    rows = [acquire(table, fake_policy("a")), acquire(table, fake_policy("b"))]
    assert table.acquire([fake_policy("c")]) is None
    table.release((rows[0],))
    assert table.acquire([fake_policy("c")]) == (rows[0],)


def test_residents_stay_and_a_refused_set_changes_nothing() -> None:
    table = make_table(3)
    table.set_resident([fake_policy("a"), fake_policy("b")])
    row = acquire(table, fake_policy("c"))
    assert table.acquire([fake_policy("d")]) is None
    with pytest.raises(PolicyTableFull):
        table.set_resident([fake_policy("d"), fake_policy("e"), fake_policy("f")])
    assert [table.find(fake_policy(name)) is not None for name in "abcd"] == [True, True, True, False]
    table.release((row,))
    table.set_resident([fake_policy("d"), fake_policy("e"), fake_policy("f")])
    assert [table.find(fake_policy(name)) is not None for name in "abcdef"] == [False, False, False, True, True, True]


def test_where_all_rows_are_resident_an_idle_one_gives_way() -> None:
    """Else a request under another policy would wait until an operator changed the default."""
    table = make_table(2)
    table.set_resident([fake_policy("a"), fake_policy("b")])
    held = acquire(table, fake_policy("a"))
    other = acquire(table, fake_policy("c"))
    assert other != held and table.find(fake_policy("b")) is None
    assert table.acquire([fake_policy("b")]) is None
    table.release((other,))
    assert table.acquire([fake_policy("b")]) == (other,)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 3), st.integers(1, 4)), max_size=30))
def test_counts_survive_the_reuse_of_rows(uses: list[tuple[str, int, int]]) -> None:
    table = make_table(2)
    expected: dict[str, list[list[int]]] = {}
    for name, tokens, top_k in uses:
        row = acquire(table, fake_policy(name, top_k))
        expert_ids = torch.full((3, tokens, 4), -1)
        expert_ids[[0, 2], :, :top_k] = torch.arange(top_k)
        table.tables.defer(expert_ids, torch.full((tokens,), row))
        table.add_routed({name: tokens})
        table.release((row,))
        totals = expected.setdefault(name, [[0] * 4 for _ in range(3)])
        for layer in (0, 2):
            for expert in range(top_k):
                totals[layer][expert] += tokens
    snapshot = table.snapshot(7)
    assert snapshot.call_id == 7
    assert snapshot.expert_tokens == expected
    assert snapshot.reachable == {name: [[0, 1, 2, 3], [], [0, 1, 2, 3]] for name in expected}
    assert snapshot.routed_tokens == {
        name: sum(tokens for other, tokens, _ in uses if other == name) for name in {name for name, _, _ in uses}
    }
    assert sum(snapshot.distinct_experts[0]) == len(uses)
    assert snapshot.distinct_experts[1] == [0] * 5


def test_a_policy_reaches_the_experts_that_any_of_its_versions_names() -> None:
    table = make_table(1)
    for experts in ((0, 3), (1,)):  # the second version takes the first one's row
        rule = LayerRule(1, experts=experts)
        table.release((acquire(table, RoutingPolicy("a", "", (rule, None, LayerRule(2)))),))
    table.release((acquire(table, RoutingPolicy("b", "", (LayerRule(1, experts=(2,)), None, LayerRule(1, experts=(0, 1))))),))
    assert table.snapshot(1).reachable == {"a": [[0, 1, 3], [], [0, 1, 2, 3]], "b": [[2], [], [0, 1]]}


def test_without_a_router_only_the_first_experts_are_reached() -> None:
    layers = tuple(layer and replace(layer, router="none") for layer in FAKE_CONFIG.layers)
    table = PolicyTable(replace(FAKE_CONFIG, layers=layers), 2, torch.device("cpu"))
    acquire(table, RoutingPolicy("a", "", (LayerRule(2), None, LayerRule(2, experts=(1, 2, 3)))))
    assert table.snapshot(1).reachable == {"a": [[0, 1], [], [1, 2]]}
