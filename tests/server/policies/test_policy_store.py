"""Persistence of policies and defaults: whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ladimo.policy import Frontier, RoutingPolicy
from server.errors import InvalidPolicy, NoFrontier, UnknownPolicy
from server.policies.store import MAX_HISTORY, STATE_FILE, PolicyStore
from server.policies.targets import Ask, AtAccuracy, Named
from tests.server.fakes import fake_policy
from tests.server.serving import CONFIG, frontier, make_store, policies


def test_state_round_trips_through_the_file(tmp_path: Path) -> None:
    store = make_store(directory=tmp_path)
    store.commit(store.put("mine", fake_policy("mine", 3).to_dict()))
    store.commit(store.set_default({"policy": "mine"}))
    store.commit(store.set_default({"auto": {"ttft_ms": 50, "min_accuracy": 0.25}}))
    assert make_store(directory=tmp_path).state == store.state


def test_a_write_that_fails_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(directory=tmp_path)
    store.commit(store.set_default({"policy": "fast"}))
    before, text = store.state, (tmp_path / STATE_FILE).read_text()

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        store.commit(store.set_default({"policy": "quality"}))
    assert store.state == before
    assert (tmp_path / STATE_FILE).read_text() == text


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"default": {"policy": "gone"}, "policies": {}, "history": []}',
     '{"default": {"policy": "full"}, "policies": {"x": {"name": "x", "layers": []}}, "history": []}'],
)  # fmt: skip
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / STATE_FILE).write_text(text)
    with pytest.raises(ValueError, match=STATE_FILE):
        make_store(directory=tmp_path)


def test_an_explicit_default_wins_over_the_persisted_one_and_can_be_rolled_back(tmp_path: Path) -> None:
    store = make_store(directory=tmp_path)
    store.commit(store.set_default({"policy": "fast"}))
    again = make_store(default=AtAccuracy(1.0), directory=tmp_path)
    assert again.state.default == AtAccuracy(1.0)
    assert again.roll_back().state.default == Named("fast")


def test_history_is_bounded_and_setting_the_same_default_adds_nothing() -> None:
    store = make_store()
    for n in range(2 * MAX_HISTORY):
        store.commit(store.set_default({"accuracy": n / 100}))
        store.commit(store.set_default({"accuracy": n / 100}))
    assert len(store.state.history) == MAX_HISTORY
    assert store.roll_back().state.default == AtAccuracy((2 * MAX_HISTORY - 2) / 100)


def test_a_model_without_frontier_takes_policies_but_no_accuracy() -> None:
    store = PolicyStore(CONFIG, policies(), None)
    assert store.resolve().accuracy is None
    with pytest.raises(NoFrontier):
        store.resolve(Ask(AtAccuracy(0.5), "body", "routing"))
    with pytest.raises(NoFrontier):
        PolicyStore(CONFIG, policies(), None, AtAccuracy(0.5))


def test_startup_mistakes_are_named() -> None:
    with pytest.raises(UnknownPolicy, match="nope"):
        make_store(default=Named("nope"))
    with pytest.raises(ValueError, match="balanced"):
        PolicyStore(CONFIG, {"full": policies()["full"]}, Frontier(frontier().points[1:2]))


def test_the_file_is_plain_policy_json(tmp_path: Path) -> None:
    store = make_store(directory=tmp_path)
    store.commit(store.put("mine", fake_policy("mine", 3).to_dict()))
    assert json.loads((tmp_path / STATE_FILE).read_text())["policies"]["mine"] == fake_policy("mine", 3).to_dict()


def limited(name: str) -> RoutingPolicy:
    policy = fake_policy(name, 2)
    layers = tuple(None if rule is None else replace(rule, batch_experts=3) for rule in policy.layers)
    return replace(policy, layers=layers)


def test_batch_budgets_need_an_engine_that_has_them(tmp_path: Path) -> None:
    """They make one request's answer depend on others, so an operator must have asked for them."""
    with pytest.raises(InvalidPolicy, match="--batch-budgets") as refused:
        make_store().put("mine", limited("mine").to_dict())
    assert refused.value.param == "layers[0].batch_experts"
    with pytest.raises(ValueError, match="'full' of the checkpoint: .*--batch-budgets"):
        PolicyStore(CONFIG, {**policies(), "full": limited("full")}, None)
    store = PolicyStore(CONFIG, policies(), frontier(), directory=tmp_path, batch_budgets=True)
    store.commit(store.put("mine", limited("mine").to_dict()))
    assert store.get("mine") == limited("mine")
    with pytest.raises(ValueError, match=STATE_FILE):
        make_store(directory=tmp_path)
