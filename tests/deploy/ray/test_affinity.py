"""The choice of a replica: the longest cached prefix under the same policies, within a bound on the queues."""

import json
from typing import Any

import pytest

from deploy.ray.affinity import MAX_PIECES, PIECE, PrefixTable, prefix_keys, rank

SYSTEM = {"role": "system", "content": "You answer questions about the weather. " * 20}


def keys(
    view: int = 1, headers: dict[str, str] | None = None, path: str = "/v1/chat/completions", **fields: Any
) -> list[bytes]:
    return list(prefix_keys(path, headers or {}, json.dumps(fields).encode(), view))


def shared(one: list[bytes], other: list[bytes]) -> int:
    assert one and other
    return sum(a == b for a, b in zip(one, other, strict=False))


def test_a_conversation_shares_its_beginning_with_its_next_turn_and_its_system_prompt_with_others() -> None:
    turns = [{"role": "user", "content": "Rain? " * 60}, {"role": "assistant", "content": "No."}]
    first, next_turn = keys(messages=[SYSTEM, turns[0]]), keys(messages=[SYSTEM, *turns])
    other = keys(messages=[SYSTEM, {"role": "user", "content": "Snow? " * 60}])
    assert shared(first, next_turn) >= len(first) - 1
    assert 0 < shared(first, other) < len(first)


@pytest.mark.parametrize(
    "other",
    [
        {"view": 2},
        {"routing": "fast"},
        {"routing": {"accuracy": 0.5}},
        {"model": "demo:fast"},
        {"service_tier": "flex"},
        {"cache_salt": "mine"},
        {"headers": {"x-routing-policy": "fast"}},
        {"headers": {"x-routing-accuracy": "0.5"}},
        {"path": "/v1/responses"},
        {"tools": [{"name": "look"}]},
    ],
)
def test_under_other_policies_nothing_is_shared(other: dict[str, Any]) -> None:
    assert shared(keys(messages=[SYSTEM]), keys(messages=[SYSTEM], **other)) == 0


def test_other_fields_do_not_matter() -> None:
    assert keys(messages=[SYSTEM]) == keys(messages=[SYSTEM], temperature=0.5, stream=True, max_tokens=7)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b'{"prompt": "short"}', b"\x1f\x8b\xff"])
def test_without_a_text_to_share_there_are_no_keys(body: bytes) -> None:
    assert prefix_keys("/v1/completions", {}, body, 1) == ()


def test_a_prompt_may_be_tokens_and_a_huge_one_has_few_keys() -> None:
    assert len(keys(path="/v1/completions", prompt=list(range(1000)))) > 20
    assert len(keys(path="/v1/completions", prompt="a" * 10 * MAX_PIECES * PIECE)) == MAX_PIECES


def test_the_longest_known_prefix_counts_and_the_oldest_is_forgotten() -> None:
    table = PrefixTable(max_keys=4)
    table.record([b"1", b"2", b"3"], "a")
    table.record([b"1", b"2"], "b")
    assert table.matches([b"1", b"2", b"3", b"4"]) == {"a": 3, "b": 2}
    assert table.matches([b"2"]) == {"a": 1, "b": 1} and table.matches([b"4", b"1"]) == {}
    table.record([b"4", b"5"], "b")
    assert table.matches([b"1", b"2", b"3"]) == {"a": 2, "b": 2}


def test_the_replica_with_the_prefix_is_first_unless_its_queue_is_too_long() -> None:
    lengths = {"a": 5, "b": 1, "c": 3}
    assert rank(lengths, {"a": 9, "c": 4}, balance=4)[0] == ["a"]
    assert rank(lengths, {"a": 9, "c": 4}, balance=3)[0] == ["c"]
    assert sorted(rank(lengths, {"a": 9, "c": 4}, balance=1)[0]) == ["a", "b", "c"]
    assert sorted(rank(lengths, {"gone": 9}, balance=9)[0]) == ["a", "b", "c"]


def test_every_replica_is_in_one_group_and_those_to_avoid_are_last() -> None:
    groups = rank({"a": 0, "b": 0, "c": 0}, {"a": 2, "b": 2}, balance=4, avoid=frozenset({"a"}))
    assert groups == [["b"], ["c"], ["a"]]
    assert rank({"a": 0}, {}, 4, frozenset({"a"})) == [["a"]]
    assert rank({}, {"a": 1}, 4) == []
