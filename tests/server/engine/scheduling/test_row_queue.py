"""Requests whose policy has no row: they wait in order, hold nobody up and are never forgotten."""

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.core import EngineCore
from server.engine.messages import Abort, Activate, Activated, StepResult, Submit
from server.engine.request import FinishReason, GenerationRequest, SamplingParams
from tests.server.fakes import fake_core, fake_policy


def submit(core: EngineCore, name: str, policy: str, max_tokens: int = 4, priority: int = 0) -> None:
    sampling = SamplingParams(max_tokens=max_tokens)
    assert core.handle(Submit(GenerationRequest(name, (1, 2, 3), sampling, fake_policy(policy), priority=priority))) is None


def ended(result: StepResult) -> list[str]:
    return [stats.request_id for stats in result.stats.finished]


def run(core: EngineCore, steps: int = 500) -> list[str]:
    """Names of the requests in the order in which they ended."""
    names: list[str] = []
    for _ in range(steps):
        if not core.has_work:
            break
        names += ended(core.step())
    assert not core.has_work
    return names


def test_a_request_waits_for_a_row_and_others_pass() -> None:
    core, _ = fake_core(max_policies=2)
    for name, policy in (("a1", "a"), ("b1", "b"), ("c1", "c"), ("d1", "d")):
        submit(core, name, policy, max_tokens=20 if name == "b1" else 4)
    first = core.step()
    assert (first.stats.running, first.stats.waiting) == (2, 2)
    submit(core, "b2", "b", max_tokens=1)
    assert run(core) == ["b2", "a1", "c1", "d1", "b1"]


def test_priority_decides_who_gets_the_row() -> None:
    core, _ = fake_core(max_policies=1)
    for name, policy, priority in (("a", "a", 0), ("b", "b", 0), ("c", "c", -1)):
        submit(core, name, policy, priority=priority)
    assert run(core) == ["a", "c", "b"]


def test_a_row_that_never_empties_is_closed_for_those_who_come_later() -> None:
    """Requests under two policies come all the time; the third policy has its turn, and then they have theirs. The policy
    whose row is not the closed one is never held up."""
    core, _ = fake_core(max_policies=2, max_num_seqs=8)
    submit(core, "b0", "b", max_tokens=6)
    submit(core, "b0'", "b", max_tokens=6)
    submit(core, "a0", "a", max_tokens=6)
    submit(core, "c", "c", max_tokens=2)
    done: list[str] = []
    for step in range(1, 40):
        done += ended(core.step())
        submit(core, f"a{step}", "a", max_tokens=6)
        submit(core, f"b{step}", "b", max_tokens=6)
    assert done.index("c") < 12
    assert [name for name in done if name.startswith("b")][:3] == ["b0", "b0'", "b1"]
    done += run(core, 2000)
    assert sorted(done) == sorted(["b0'", "c"] + [f"{policy}{step}" for policy in "ab" for step in range(40)])


def test_one_that_waits_for_a_row_can_leave() -> None:
    core, _ = fake_core(max_policies=1)
    submit(core, "a", "a")
    submit(core, "b", "b")
    submit(core, "c", "c")
    core.handle(Abort("b"))
    result = core.step()
    (stats,) = result.stats.finished
    assert (stats.request_id, stats.finish_reason, stats.generation_tokens) == ("b", FinishReason.ABORT, 0)
    assert run(core) == ["a", "c"]


commands = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from("abcdef"), st.integers(1, 12), st.integers(-1, 1)),
    st.tuples(st.just("abort"), st.integers(0, 60)),
    st.tuples(st.just("activate"), st.sets(st.sampled_from("abcdef"), max_size=3)),
    st.tuples(st.just("step")),
)


@settings(max_examples=150, deadline=None)
@given(script=st.lists(commands, max_size=60), max_policies=st.integers(1, 4), max_num_seqs=st.integers(1, 4))
def test_every_request_ends_once(script: list[tuple[object, ...]], max_policies: int, max_num_seqs: int) -> None:
    """Whatever comes in whatever order, with fewer rows than policies and few blocks: nothing is lost and nothing hangs."""
    core, _ = fake_core(max_policies=max_policies, max_num_seqs=max_num_seqs, num_blocks=18)
    submitted: list[str] = []
    done: list[str] = []
    for command in script:
        match command:
            case ("submit", str(policy), int(max_tokens), int(priority)):
                submitted.append(f"r{len(submitted)}")
                submit(core, submitted[-1], policy, max_tokens, priority)
            case ("abort", int(number)):
                core.handle(Abort(f"r{number}"))
            case ("activate", set(names)):
                core.handle(Activate(0, tuple(fake_policy(name) for name in sorted(names))))
            case _ if core.has_work:
                done += ended(core.step())
    done += run(core)
    assert sorted(done) == sorted(submitted)
    assert core.handle(Activate(7, tuple(fake_policy(f"new{n}") for n in range(max_policies)))) == Activated(7)
