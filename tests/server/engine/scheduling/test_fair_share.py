"""Turns between flows: nobody starves, a flood delays others by a bounded amount, equal demand gets equal service."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.request import AGING_SECONDS, GenerationRequest, SamplingParams, Sequence
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.fair_share import OUTPUT_COST, FairShare
from server.engine.scheduling.scheduler import Scheduler
from server.policies.tiers import FLEX_PRIORITY
from tests.server.fakes import fake_policy

POLICY = fake_policy("p")
CLOCK = iter(range(10**9))


def make(flow: str, prompt: int = 4, max_tokens: int = 8, priority: int = 0) -> Sequence:
    number = next(CLOCK)
    request = GenerationRequest(
        f"{flow}-{number}", tuple(range(prompt)), SamplingParams(max_tokens), POLICY, priority=priority, flow=flow
    )
    return Sequence(request=request, rows=(1,), seed=0, arrived=float(number), expert_counts=[])


def scheduler(max_num_seqs: int = 2, num_blocks: int = 200) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, 4), max_num_seqs, 64, 64, prefix_caching=False)


def step(turns: Scheduler) -> list[Sequence]:
    """Run one step; the sequences that it ended."""
    batch = turns.schedule()
    drawing = batch.drawing
    return [one for one, reason in turns.update(batch, [0] * len(drawing), frozenset()) if reason is not None]


def order_of_ends(turns: Scheduler) -> list[str]:
    ends = []
    while turns.has_work:
        ends += [sequence.request.flow for sequence in step(turns)]
    return ends


def test_without_flows_the_oldest_goes_first() -> None:
    turns = scheduler(max_num_seqs=1)
    sequences = [make("", prompt=1 + i % 3) for i in range(6)]
    for sequence in reversed(sequences):
        turns.add(sequence)
    ends = []
    while turns.has_work:
        ends += step(turns)
    assert ends == sequences


def test_a_flood_delays_a_newcomer_by_one_turn() -> None:
    turns = scheduler()
    for _ in range(50):
        turns.add(make("flood"))
    for _ in range(30):
        step(turns)
    turns.add(make("light"))
    assert "light" in order_of_ends(turns)[:4]  # the two that ran, at most one more, the newcomer


def test_priority_comes_before_turns() -> None:
    turns = scheduler(max_num_seqs=1)
    turns.add(make("a"))
    step(turns)
    turns.add(make("b", priority=1))
    turns.add(make("a"))
    turns.add(make("a"))
    assert order_of_ends(turns) == ["a", "a", "a", "b"]


@pytest.mark.parametrize("flows", [["a"], ["a", "b"], ["c", "d"]])
def test_the_lowest_tier_gets_its_turn_although_the_queue_is_never_empty(flows: list[str]) -> None:
    """One request comes and one ends in each second, and five wait."""
    turns = scheduler(max_num_seqs=1)
    patient = make("a", max_tokens=1, priority=FLEX_PRIORITY)
    turns.add(patient)
    for number in range(5):
        turns.add(make(flows[number % len(flows)], max_tokens=1))
    for second in range(10**4):
        turns.add(make(flows[second % len(flows)], max_tokens=1))
        if patient in step(turns):
            break
        assert len(turns.waiting) == 6
    bound = FLEX_PRIORITY * AGING_SECONDS
    assert bound - 10 <= second <= bound + 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 8), st.integers(-2, 3)), min_size=2, max_size=20), st.integers(1, 3))
def test_a_request_lets_only_those_pass_that_come_soon_after_it(asked: list[tuple[float, int]], steps_each: int) -> None:
    turns, now = scheduler(max_num_seqs=1), 0.0
    for gap, priority in asked:
        now += gap
        sequence = make("", max_tokens=2, priority=priority)
        sequence.arrived = now
        turns.add(sequence)
        for _ in range(steps_each):
            before = list(turns.waiting)
            step(turns)
            for taken in set(map(id, before)) - set(map(id, turns.waiting)):
                (chosen,) = (each for each in before if id(each) == taken)
                for passed in turns.waiting:
                    steps = passed.request.priority - chosen.request.priority
                    assert chosen.arrived <= passed.arrived + AGING_SECONDS * steps + 1e-6


def test_a_flood_of_a_higher_number_takes_turns_when_it_has_aged() -> None:
    turns = scheduler(max_num_seqs=1)
    for _ in range(40):
        turns.add(make("flood", priority=1))
    for _ in range(4):
        turns.add(make("light"))
    assert order_of_ends(turns)[:8].count("light") == 4


def test_absence_saves_nothing_up_and_debt_is_not_forgotten() -> None:
    share = FairShare()
    share.enter("busy")
    share.charge("busy", 100)
    share.enter("back")
    assert share.served("back") == 100
    share.charge("back", 50)
    share.leave("back")
    share.enter("back")
    assert share.served("back") == 150
    share.leave("back")
    share.charge("busy", 500)
    share.enter("back")
    assert share.served("back") == 600
    share.leave("back")
    share.leave("busy")
    share.enter("new")
    assert share.served("new") == 0


def test_nothing_is_remembered_of_flows_that_owe_nothing() -> None:
    share = FairShare()
    share.enter("stays")
    for index in range(1000):
        share.enter(f"f{index}")
        share.charge(f"f{index}", 10)
        share.charge("stays", 10)
        share.leave(f"f{index}")
    assert len(share._served) < 5


@settings(max_examples=80, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(2, 5))
def test_a_newcomer_waits_for_at_most_one_admission_of_each_other_flow(
    rng: random.Random, max_num_seqs: int, num_flows: int
) -> None:
    turns = scheduler(max_num_seqs)
    for _ in range(40):
        turns.add(make(f"f{rng.randrange(num_flows)}", rng.randrange(1, 20), rng.randrange(1, 20)))
    for _ in range(rng.randrange(0, 40)):
        step(turns)
    newcomer = make("newcomer")
    turns.add(newcomer)
    known = set(turns.running)
    admitted: Counter[str] = Counter()
    while True:
        step(turns)
        new = {sequence for sequence in (*turns.running, newcomer) if sequence.charged} - known
        if newcomer in new:
            break
        admitted.update(sequence.request.flow for sequence in new)
        known |= new
    assert all(count == 1 for count in admitted.values())
    while turns.has_work:
        step(turns)
    assert len(newcomer.output_ids) == 8
    turns.blocks.check([])


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(40, 80))
def test_flows_that_always_wait_are_served_alike(rng: random.Random, max_num_seqs: int, num_blocks: int) -> None:
    """Theorem 4.3 of the paper: the difference never exceeds twice the most one round of admissions can cost."""
    turns = scheduler(max_num_seqs, num_blocks)
    sizes = {"short": (4, 4), "long": (30, 20)}
    served: Counter[str] = Counter()
    bound = 2 * max(30, OUTPUT_COST * max_num_seqs * 20 + 30 * max_num_seqs)
    for _ in range(400):
        for flow, (prompt, most) in sizes.items():
            while sum(one.request.flow == flow for one in turns.waiting) < 3:
                turns.add(make(flow, rng.randrange(1, prompt + 1), rng.randrange(1, most + 1)))
        for flow in sizes:
            served[flow] = turns.share.served(flow)
        assert abs(served["short"] - served["long"]) <= bound
        step(turns)
    assert min(served.values()) > bound, "too short to tell"
