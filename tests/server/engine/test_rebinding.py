"""Another policy for requests that have not begun: all sequences of a request or none, and what has begun keeps its own."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.core import EngineCore
from server.engine.messages import Abort, Rebind, Rebinding, Rebound, Submit
from server.engine.request import GenerationRequest, LaterPhases, SamplingParams
from tests.server.fakes import FakeRunner, fake_core, fake_policy
from tests.server.policies.plant import PRICES

PROMPT = tuple(range(1, 10))  # two full blocks and a token


def submit(core: EngineCore, name: str, policies: str, max_tokens: int = 3, priority: int = 0) -> None:
    """Policies are separated by blanks: that of the prompt, that of the answer, and those of phases that do not begin."""
    first, *others = map(fake_policy, policies.split())
    later = LaterPhases(tuple(others), after_prompt=True) if others else None
    sampling = SamplingParams(max_tokens=max_tokens)
    assert core.handle(Submit(GenerationRequest(name, PROMPT, sampling, first, priority=priority, later=later))) is None


def rebind(core: EngineCore, *changes: tuple[str, str]) -> tuple[bool, ...]:
    """Each change: the names of sequences and their new policies, separated by blanks."""
    reply = core.handle(
        Rebind(tuple(Rebinding(tuple(names.split()), tuple(map(fake_policy, policies.split()))) for names, policies in changes))
    )
    assert isinstance(reply, Rebound)
    return reply.changed


def served(core: EngineCore) -> dict[str, str]:
    """The policies under which the requests ended, by name."""
    found: dict[str, str] = {}
    while core.has_work:
        found |= {stats.request_id: stats.policy for stats in core.step().stats.finished}
    return found


def users(runner: FakeRunner) -> dict[str, int]:
    return {row.policy.name: row.users for row in runner.table._rows if row is not None}


def test_waiting_requests_change_and_others_keep_their_policy() -> None:
    core, runner = fake_core(max_num_seqs=1)
    for name in ("running", "waiting", "other"):
        submit(core, name, "full")
    core.step()
    assert rebind(core, ("running", "fast"), ("waiting", "fast"), ("unknown", "fast")) == (False, True, False)
    assert users(runner) == {"full": 2, "fast": 1}
    assert served(core) == {"running": "full", "waiting": "fast", "other": "full"}
    assert set(users(runner).values()) == {0}


def test_all_phases_of_a_waiting_request_change() -> None:
    core, runner = fake_core(max_num_seqs=1)
    submit(core, "running", "full quality")
    submit(core, "waiting", "full quality")
    core.step()
    assert rebind(core, ("running", "balanced fast"), ("waiting", "balanced fast")) == (False, True)
    assert users(runner) == {"full": 1, "quality": 1, "balanced": 1, "fast": 1}
    prefilled, decoded = Counter[str](), Counter[str]()
    while core.has_work:
        stats = core.step().stats
        prefilled.update(stats.prefilled_tokens)
        decoded.update(stats.decode_rows)
    assert prefilled == {"balanced": len(PROMPT)}
    assert decoded == {"quality": 2, "fast": 2}
    assert set(users(runner).values()) == {0}


def test_phases_change_only_if_all_their_policies_get_rows() -> None:
    core, runner = fake_core(max_num_seqs=1, max_policies=3)
    submit(core, "running", "full quality")
    submit(core, "waiting", "full quality")
    core.step()
    assert rebind(core, ("waiting", "balanced fast")) == (False,)
    assert rebind(core, ("waiting", "quality fast")) == (True,)
    assert users(runner) == {"full": 1, "quality": 2, "fast": 1}


def test_sequences_of_a_request_change_together_or_not_at_all() -> None:
    core, _ = fake_core(max_num_seqs=1)
    for name in ("a0", "a1", "b0", "b1"):
        submit(core, name, "full")
    core.step()  # a0 begins
    assert rebind(core, ("a0 a1", "fast"), ("b0 b1", "fast"), ("b0 b1 b2", "quality")) == (False, True, False)
    assert served(core) == {"a0": "full", "a1": "full", "b0": "fast", "b1": "fast"}


def test_a_request_that_was_sent_back_to_the_queue_has_begun() -> None:
    core, _ = fake_core(max_num_seqs=2, max_model_len=20, num_blocks=6)
    submit(core, "first", "full", max_tokens=10)
    submit(core, "second", "full", max_tokens=10)
    while not core._scheduler.preemptions:
        core.step()
    assert rebind(core, ("second", "fast")) == (False,)


def test_blocks_of_the_policy_before_are_not_shared() -> None:
    core, _ = fake_core(max_num_seqs=1)
    submit(core, "running", "full", max_tokens=6)
    submit(core, "waiting", "full")
    core.step()
    core._scheduler._cached_prefix(core._scheduler.waiting[0])  # as if it had not found enough blocks
    assert rebind(core, ("waiting", "fast")) == (True,)
    cached: dict[str, int] = {}
    while core.has_work:
        cached |= {stats.request_id: stats.cached_tokens for stats in core.step().stats.finished}
    assert cached == {"running": 0, "waiting": 0}


def test_without_a_free_row_a_request_keeps_its_policy_and_one_without_rows_may_change() -> None:
    core, _ = fake_core(max_num_seqs=1, max_policies=1)
    for name, policy in (("running", "full"), ("waiting", "full"), ("without", "quality")):
        submit(core, name, policy, max_tokens=1 if name == "without" else 3)
    core.step()
    assert rebind(core, ("waiting", "fast")) == (False,)
    assert rebind(core, ("without", "full")) == (True,)
    assert served(core) == {"running": "full", "waiting": "full", "without": "full"}


def test_a_closed_row_is_not_joined() -> None:
    """`c` waits for the row of `a`. If those that wait joined `a` again and again, `c` would never run."""
    core, runner = fake_core(max_num_seqs=2, max_policies=2)
    for name, policy in (("a", "a"), ("b", "b"), ("c", "c"), ("b2", "b"), ("b3", "b b")):
        submit(core, name, policy)
    core.step()
    closed = {runner.table._rows[row].policy.name for row in core._row_queue._closed}  # type: ignore[union-attr]
    assert closed == {"a"}
    assert rebind(core, ("b2", "a"), ("b3", "b a")) == (False, False)
    assert served(core)["c"] == "c"


PHASES = st.lists(st.sampled_from([*PRICES]), min_size=1, max_size=3)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), PHASES),
        st.tuples(st.just("rebind"), PHASES),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("step"), st.integers(1, 4)),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, rows=st.integers(1, 4))
def test_whatever_happens_a_request_runs_under_the_policies_that_were_promised(
    actions: list[tuple[str, Any]], rows: int
) -> None:
    core, runner = fake_core(max_num_seqs=2, max_policies=rows)
    told: dict[str, list[str]] = {}  # by request: what its client would read, for each phase
    begun, gone, ended = set[str](), set[str](), dict[str, str]()

    def step() -> None:
        for sequence in (*core._scheduler.waiting, *core._scheduler.running):
            entries = [runner.table._rows[row] for row in sequence.rows]
            assert [entry.policy.name for entry in entries if entry is not None] == told[sequence.request.request_id]
        result = core.step()
        begun.update(event.request_id for event in result.events)
        ended.update({stats.request_id: stats.policy for stats in result.stats.finished})

    for action, value in actions:
        if action == "submit":
            name = f"r{len(told)}"
            told[name] = value[:rows]
            submit(core, name, " ".join(told[name]), priority=len(told) % 2)
        elif action == "rebind":
            asked = [name for name in told if name not in gone]
            others = {name: (value * rows)[: len(told[name])] for name in asked}
            changed = rebind(core, *((name, " ".join(others[name])) for name in asked))
            for name, took in zip(asked, changed, strict=True):
                assert not (took and name in begun)
                told[name] = others[name] if took else told[name]
        elif action == "abort":
            gone.add(f"r{value}")
            core.handle(Abort(f"r{value}"))
        else:
            for _ in range(value):
                if core.has_work:
                    step()
    while core.has_work:
        step()
    assert ended == {name: told[name][0] for name in ended}
    assert told.keys() - gone <= ended.keys()
    assert set(users(runner).values()) <= {0}


@pytest.mark.parametrize("first", ["flow", ""])
def test_a_change_costs_a_flow_nothing(first: str) -> None:
    core, _ = fake_core(max_num_seqs=1)
    sampling = SamplingParams(max_tokens=2)
    for name, flow in (("a", first), ("b", "other"), ("c", first)):
        core.handle(Submit(GenerationRequest(name, PROMPT, sampling, fake_policy("full"), flow=flow)))
    core.step()
    served_before = {flow: core._scheduler.share.served(flow) for flow in (first, "other")}
    assert rebind(core, ("b", "fast"), ("c", "fast")) == (True, True)
    assert {flow: core._scheduler.share.served(flow) for flow in (first, "other")} == served_before
