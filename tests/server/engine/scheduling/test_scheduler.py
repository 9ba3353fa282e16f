"""The scheduler as properties: nothing is lost, no block is shared by accident, every step moves something."""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladimo.policy import RoutingPolicy
from server.engine.request import FinishReason, GenerationRequest, SamplingParams, Sequence
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.scheduler import Scheduler
from tests.server.fakes import fake_policy

POLICY = fake_policy("p")


def make_sequence(name: str, prompt: int, max_tokens: int, policy: RoutingPolicy = POLICY, salt: str = "") -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens)
    request = GenerationRequest(name, tuple(range(1, prompt + 1)), sampling, policy, cache_salt=salt)
    return Sequence(request=request, rows=(1,), seed=0, arrived=time.monotonic(), expert_counts=[])


def check_blocks(scheduler: Scheduler) -> None:
    scheduler.blocks.check([sequence.block_table for sequence in scheduler.running])
    assert all(not sequence.block_table and sequence.num_computed == 0 for sequence in scheduler.waiting)


def run_step(scheduler: Scheduler) -> list[tuple[Sequence, FinishReason | None]]:
    """One step whose runner answers with the length of the sequence, so that every output is predictable."""
    batch = scheduler.schedule()
    assert 0 < batch.num_tokens <= scheduler.max_step_tokens
    assert len(scheduler.running) <= scheduler.max_num_seqs
    tokens = []
    for sequence, count in batch.scheduled:
        assert len(sequence.block_table) >= scheduler.blocks.blocks_for(sequence.num_computed + count)
        written = range(sequence.num_computed // scheduler.blocks.block_size, len(sequence.block_table))
        others = {b for other in scheduler.running if other is not sequence for b in other.block_table}
        assert not others & {sequence.block_table[index] for index in written}, "writes to a block that another one reads"
        if sequence.num_computed + count == sequence.num_tokens:
            tokens.append(sequence.num_tokens)
    assert len({id(sequence) for sequence, _ in batch.scheduled}) == len(batch.scheduled)
    return scheduler.update(batch, tokens, frozenset())


def cached_tokens(scheduler: Scheduler, sequence: Sequence) -> int:
    """Run a sequence to its end; how many of its tokens were not computed."""
    scheduler.add(sequence)
    while scheduler.has_work:
        run_step(scheduler)
    return sequence.num_cached


requests = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(1, 5), st.integers(5, 48), st.integers(18, 60), st.data())
def test_every_request_finishes_with_its_own_tokens(
    specs: list[tuple[int, int, int]], max_num_seqs: int, max_step_tokens: int, num_blocks: int, data: st.DataObject
) -> None:
    max_model_len = 64
    scheduler = Scheduler(BlockManager(max(num_blocks, 17), 4), max_num_seqs, max_step_tokens, max_model_len)
    sequences = [make_sequence(f"r{i}", prompt, max_tokens) for i, (prompt, max_tokens, _) in enumerate(specs)]
    arrivals = sorted(range(len(specs)), key=lambda i: specs[i][2])
    finished: list[Sequence] = []
    removed: set[str] = set()
    for step in range(5000):
        while arrivals and specs[arrivals[0]][2] <= step:
            scheduler.add(sequences[arrivals.pop(0)])
        if data.draw(st.integers(0, 15)) == 0:
            victim = f"r{data.draw(st.integers(0, len(specs) - 1))}"
            if scheduler.remove(victim) is not None:
                removed.add(victim)
        if not scheduler.has_work:
            if not arrivals:
                break
            continue
        finished += [sequence for sequence, reason in run_step(scheduler) if reason is not None]
        check_blocks(scheduler)
    assert not scheduler.has_work
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks - 1
    assert {s.request.request_id for s in finished} | removed == {s.request.request_id for s in sequences}
    for sequence in finished:
        prompt, wanted = len(sequence.request.prompt_ids), sequence.request.sampling.max_tokens
        expected = min(wanted, max_model_len - prompt)
        assert sequence.output_ids == list(range(prompt, prompt + expected))


def test_a_prefix_is_shared_under_the_same_policy_and_salt_only() -> None:
    scheduler = Scheduler(BlockManager(60, 4), max_num_seqs=4, max_step_tokens=64, max_model_len=64)
    assert cached_tokens(scheduler, make_sequence("first", 20, 3)) == 0
    assert cached_tokens(scheduler, make_sequence("same", 20, 3)) == 16  # the last token is always computed
    assert cached_tokens(scheduler, make_sequence("longer", 31, 3)) == 20
    assert cached_tokens(scheduler, make_sequence("other policy", 20, 3, policy=fake_policy("q"))) == 0
    assert cached_tokens(scheduler, make_sequence("other salt", 20, 3, salt="s")) == 0
    assert cached_tokens(scheduler, make_sequence("same salt", 20, 3, salt="s")) == 16
    scheduler.blocks.check([])


@pytest.mark.parametrize(("batch_experts", "cached"), [(None, 28), (2, 16)])
def test_what_decoding_computed_is_shared_unless_it_depends_on_the_batch(batch_experts: int | None, cached: int) -> None:
    """A conversation goes on: its first answer is part of the prompt. Under a budget for the batch only the prompt is kept."""
    layers = tuple(None if rule is None else replace(rule, batch_experts=batch_experts) for rule in POLICY.layers)
    policy = replace(POLICY, layers=layers)
    scheduler = Scheduler(BlockManager(60, 4), max_num_seqs=4, max_step_tokens=64, max_model_len=64)
    first = make_sequence("first", 18, 14, policy)
    assert cached_tokens(scheduler, first) == 0
    again = make_sequence("again", 1, 3, policy)
    again.request = replace(again.request, prompt_ids=(*first.request.prompt_ids, *first.output_ids))
    assert cached_tokens(scheduler, again) == cached


def test_running_sequences_share_and_the_cache_gives_way_to_need() -> None:
    scheduler = Scheduler(BlockManager(12, 4), max_num_seqs=4, max_step_tokens=64, max_model_len=40)
    cached_tokens(scheduler, make_sequence("first", 17, 2))
    both = [make_sequence("a", 17, 8), make_sequence("b", 17, 8)]
    for sequence in both:
        scheduler.add(sequence)
    run_step(scheduler)
    assert both[0].block_table[:4] == both[1].block_table[:4]
    assert both[0].block_table[4] != both[1].block_table[4]
    check_blocks(scheduler)
    while scheduler.has_work:
        run_step(scheduler)
        check_blocks(scheduler)
    other = make_sequence("other", 30, 9, policy=fake_policy("q"))  # needs nearly every block: cached ones are forgotten
    assert cached_tokens(scheduler, other) == 0
    assert other.output_ids == list(range(30, 39))
    scheduler.blocks.check([])


def test_running_requests_decode_beside_a_long_prompt() -> None:
    scheduler = Scheduler(BlockManager(100, 4), max_num_seqs=4, max_step_tokens=8, max_model_len=64)
    short, long = make_sequence("short", 2, 20), make_sequence("long", 40, 5)
    scheduler.add(short)
    run_step(scheduler)
    scheduler.add(long)
    while long.num_computed < 40:
        before = len(short.output_ids)
        run_step(scheduler)
        assert len(short.output_ids) == before + 1


def test_the_newest_gives_way_and_is_computed_again() -> None:
    scheduler = Scheduler(BlockManager(9, 4), max_num_seqs=4, max_step_tokens=64, max_model_len=32)
    old, new = make_sequence("old", 8, 20), make_sequence("new", 8, 20)
    scheduler.add(old)
    scheduler.add(new)
    order = []
    while scheduler.has_work:
        order += [sequence.request.request_id for sequence, reason in run_step(scheduler) if reason is not None]
    assert order == ["old", "new"]
    assert scheduler.preemptions > 0
    assert new.output_ids == list(range(8, 28))
