"""Captured decode steps do what steps without graphs do. On CPU a capture is run again; tests/gpu does the same with graphs."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladimo.checkpoint import load_model
from ladimo.model.transformer import MoeTransformer
from server.engine.batch import Batch
from server.engine.build import assemble_core
from server.engine.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.graphs.cuda_graphs import DecodeGraphs, Rerun, bucket_sizes
from server.engine.messages import Abort, Activate
from server.engine.model_runner import BatchOutput, ModelRunner
from server.engine.request import GenerationRequest, SamplingParams
from tests.server.engine.graphs import (
    Driver,
    assert_idle,
    eight_policies,
    graph_core,
    mixed_requests,
    null_block_is_finite,
    random_prompts,
    rules,
    snapshot,
)
from tests.server.fakes import FakeRunner, fake_core, fake_policy

CONFIG = EngineConfig(device="cpu", max_num_seqs=9, block_size=4, max_step_tokens=48, max_policies=12, max_model_len=96)


class CountingBackend(Rerun):
    captured = 0

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        return super().capture(step)


@pytest.fixture(scope="module")
def model(moe_dir: Path) -> MoeTransformer:
    return load_model(moe_dir, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, (1,)), (3, (1, 2, 3)), (9, (1, 2, 4, 8, 9)), (32, (1, 2, 4, 8, 16, 24, 32))],
)
def test_buckets(most: int, sizes: tuple[int, ...]) -> None:
    assert bucket_sizes(most) == sizes


def test_buckets_of_a_large_engine_end_at_512() -> None:
    sizes = bucket_sizes(4096)
    assert sizes[-1] == 512
    assert {256, 272, 496} < set(sizes)
    assert bucket_sizes(300)[-2:] == (288, 300)


@pytest.mark.parametrize("count", range(1, 10))
def test_replay_equals_eager_for_every_bucket_and_a_mix_of_policies(moe_dir: Path, model: MoeTransformer, count: int) -> None:
    asked = mixed_requests(moe_dir, count)
    eager, replayed = Driver(assemble_core(model, CONFIG)), Driver(graph_core(model, CONFIG))
    for driver in (eager, replayed):
        driver.submit(*asked)
        driver.run()
        assert_idle(driver.core)
    assert replayed.tokens == eager.tokens
    told = [[event.logprobs.logprob for event in driver.events if event.logprobs] for driver in (eager, replayed)]
    assert told[0] == pytest.approx(told[1], abs=1e-4)
    ends = {event.request_id: event.finished for event in replayed.events if event.finished}
    for event in eager.events:
        if event.finished:
            assert ends[event.request_id].experts_per_token == event.finished.experts_per_token
    assert eager.buckets == [None] * len(eager.buckets)
    decodes = [step.decode_tokens for step in replayed.steps if step.decode_tokens and not step.prefill_tokens]
    assert replayed.buckets == [min(size for size in bucket_sizes(9) if size >= rows) for rows in decodes]
    # Step for step the same choices, counted the same: what padding counts would show here.
    assert snapshot(replayed.core).expert_tokens == snapshot(eager.core).expert_tokens
    assert snapshot(replayed.core).routed_tokens == snapshot(eager.core).routed_tokens
    assert snapshot(replayed.core).distinct_experts == snapshot(eager.core).distinct_experts
    assert null_block_is_finite(replayed.core)


def test_batch_budgets_under_graphs(moe_dir: Path, model: MoeTransformer) -> None:
    """Policies with and without a budget in one batch, padded: the same tokens and experts, and fewer different ones than
    without budgets."""
    policies = [rules(moe_dir, "two", top_k=2, batch_experts=2), rules(moe_dir, "one", top_k=3, batch_experts=1)]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    asked = [GenerationRequest(f"r{i}", tuple(prompt), sampling, policies[i % 2]) for i, prompt in enumerate(random_prompts(6))]
    limited = replace(CONFIG, batch_budgets=True)
    drivers = [
        Driver(core) for core in (assemble_core(model, limited), graph_core(model, limited), assemble_core(model, CONFIG))
    ]
    for driver in drivers:
        driver.submit(*asked)
        driver.run()
    eager, replayed, free = drivers
    assert replayed.tokens == eager.tokens
    assert snapshot(replayed.core).distinct_experts == snapshot(eager.core).distinct_experts

    def read(core: EngineCore) -> int:
        return sum(number * count for layer in snapshot(core).distinct_experts for number, count in enumerate(layer))

    assert read(eager.core) < read(free.core)


def test_dense_model_replays_too(dense_dir: Path) -> None:
    dense = load_model(dense_dir, torch.float32, torch.device("cpu"))
    policy = fake_policy("dense")
    policy = replace(policy, layers=(None,) * dense.config.num_hidden_layers)
    asked = GenerationRequest("r", tuple(random_prompts(1)[0]), SamplingParams(max_tokens=9, temperature=0.0), policy)
    answers = []
    for core in (assemble_core(dense, CONFIG), graph_core(dense, CONFIG)):
        driver = Driver(core)
        driver.submit(asked)
        answers.append(driver.run())
    assert answers[0] == answers[1]
    assert set(driver.buckets) == {1}


def test_captures_happen_at_start_only(moe_dir: Path, model: MoeTransformer) -> None:
    backend = CountingBackend()
    driver = Driver(graph_core(model, CONFIG, backend))
    assert backend.captured == 3 * len(bucket_sizes(9))
    policies = eight_policies(moe_dir)
    for index, request in enumerate(mixed_requests(moe_dir, 9)):
        driver.submit(request)
        driver.step()
        driver.handle(Activate(index, (policies[index % 8],)))
    driver.run()
    assert backend.captured == 3 * len(bucket_sizes(9))
    assert [step.cuda_graph_captures for step in driver.steps] == [backend.captured] + [0] * (len(driver.steps) - 1)
    assert any(step.cuda_graph_missed for step in driver.steps)
    assert all(step.cuda_graph_missed == (step.prefill_tokens > 0 < step.decode_tokens) for step in driver.steps)


def decoding(core: EngineCore, *requests: GenerationRequest) -> tuple[ModelRunner, DecodeGraphs, Batch]:
    """The engine's insides just before a step in which all of these decode."""
    driver = Driver(core)
    driver.submit(*requests)
    while not (driver.steps and driver.steps[-1].decode_tokens == len(requests)):
        driver.step()
    if core._flight is not None:
        core._land(core._flight)
        core._flight = None
    runner = core._runner
    assert isinstance(runner, ModelRunner) and runner.graphs is not None
    return runner, runner.graphs, core._scheduler.schedule()


def test_a_table_swapped_between_replays_changes_the_outcome(moe_dir: Path, model: MoeTransformer) -> None:
    """The same graph, the same rows: only the policy's numbers differ."""
    asked = replace(mixed_requests(moe_dir, 1)[0], sampling=SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
    runner, graphs, batch = decoding(graph_core(model, CONFIG), asked)
    row = batch.decode[0].rows[0]
    seen, expected = [], []
    for policy in eight_policies(moe_dir):
        runner.tables.write(row, *policy.to_rows(model.config.max_num_experts))
        graphs.fill(batch, 1)
        graphs.replay_step(1)
        seen.append(graphs.buffers.logits[0].clone())
        runner.graphs = None  # the same step without graphs
        out = runner.launch(batch)()
        runner.graphs = graphs
        expected.append(out)
        assert graphs.buffers.results[0].tolist() == [out.drawn[0].token_id, *out.expert_counts[0], 0]
    assert all(not torch.equal(seen[i], seen[j]) for i in range(4) for j in range(i))


def test_padding_counts_nothing_and_touches_no_cache(moe_dir: Path, model: MoeTransformer) -> None:
    """Rubbish in every block, rows left from a fuller step: padded rows change the null block and nothing else."""
    asked = [
        replace(r, sampling=SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)) for r in mixed_requests(moe_dir, 8)
    ]
    runner, graphs, batch = decoding(graph_core(model, CONFIG), *asked)
    tables, cache = runner.tables, runner.kv_cache
    batch = Batch(decode=batch.decode[:5])  # bucket 8: the last three rows have been someone else's
    counts, distinct = tables.expert_tokens.clone(), tables.distinct_experts.clone()
    k, v = cache.k.clone(), cache.v.clone()
    graphs.fill(batch, 8)
    graphs.replay_step(8)
    slots = [s.block_table[s.num_computed // 4] * 4 + s.num_computed % 4 for s in batch.decode]
    for before, after in ((k, cache.k), (v, cache.v)):
        changed = (before != after).flatten(1, 2).any(dim=-1).any(dim=-1).any(dim=0).nonzero().flatten().tolist()
        assert set(changed) <= {0, *slots}
        assert set(slots) <= set(changed)
    assert (graphs.buffers.block_table[5:8] == 0).all()
    assert (graphs.buffers.expert_ids[:, 5:8] == -1).all()
    assert (graphs.buffers.results[5:8, 1:] == 0).all()
    added = tables.expert_tokens - counts
    assert (added[0] == 0).all()
    chosen = graphs.buffers.expert_ids[:, :5]
    assert added.sum() == (chosen >= 0).sum() > 0
    for layer in model.config.moe_layer_indices:
        number = len(set(chosen[layer].flatten().tolist()) - {-1})
        assert (tables.distinct_experts - distinct)[layer].tolist() == [int(n == number) for n in range(5)]


class EagerlyAhead(FakeRunner):
    """A runner that replays every decode step and works out its tokens only when they are waited for, as a device does."""

    def graph_bucket(self, batch: Batch) -> int | None:
        return None if batch.prefill else len(batch.decode)

    def launch(self, batch: Batch) -> Callable[[], BatchOutput]:
        self.ahead = getattr(self, "ahead", 0) + (batch.previous is not None)
        return lambda: self.execute(batch)


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 6), st.integers(17, 60), st.sampled_from([0, 3, 11]))
def test_running_ahead_keeps_every_invariant(rng: random.Random, max_num_seqs: int, num_blocks: int, eos_every: int) -> None:
    """Random arrivals and aborts, ends that nobody could foresee, too few blocks: each answer is what it would be alone."""
    eos = frozenset(range(0, 300, eos_every)) if eos_every else frozenset()
    core, fake = fake_core(max_num_seqs=max_num_seqs, num_blocks=num_blocks, eos_token_ids=eos)
    runner = EagerlyAhead(fake.table)
    core._runner = runner
    driver = Driver(core)
    expected: dict[str, list[int]] = {}
    aborted: set[str] = set()
    for name in (f"r{index}" for index in range(14)):
        prompt = [rng.randrange(1, 300) for _ in range(rng.randrange(1, 30))]
        most = rng.randrange(1, 30)
        answer: list[int] = []
        while len(answer) < min(most, 64 - len(prompt)) and not (answer and answer[-1] in eos):
            answer.append(([*prompt, *answer][-1] + 1) % 300)
        expected[name] = answer
        sampling = SamplingParams(max_tokens=most, logprobs=2 if rng.random() < 0.1 else None)
        policy = fake_policy(rng.choice("pqr"), rng.randrange(1, 4))
        driver.submit(GenerationRequest(name, tuple(prompt), sampling, policy))
        for _ in range(rng.randrange(0, 12)):
            if core.has_work:
                driver.step()
                scheduler = core._scheduler
                scheduler.blocks.check([sequence.block_table for sequence in scheduler.running])
            if rng.random() < 0.05:
                victim = rng.choice(sorted(expected))
                driver.handle(Abort(victim))
                aborted.add(victim)
    answers = driver.run()
    for name, answer in expected.items():
        if name in aborted:
            assert answers[name] == answer[: len(answers[name])]
        else:
            assert answers[name] == answer
    assert_idle(core)
    ends = [event for event in driver.events if event.finished]
    assert len(ends) == len({event.request_id for event in ends})


def test_an_engine_that_decodes_runs_ahead() -> None:
    """Else the test above says nothing. Every step but the first two (the prompt, the first decode) is launched early."""
    core, fake = fake_core()
    core._runner = runner = EagerlyAhead(fake.table)
    driver = Driver(core)
    driver.submit(GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=20), fake_policy("p")))
    assert driver.run()["r"] == list(range(4, 24))
    assert runner.ahead == 18
    assert len(driver.steps) == 20


def test_running_ahead_keeps_nobody_waiting() -> None:
    """A newcomer waits for the step that is already in flight and no other."""
    core, fake = fake_core()
    core._runner = EagerlyAhead(fake.table)
    driver = Driver(core)
    driver.submit(GenerationRequest("long", (1, 2, 3), SamplingParams(max_tokens=50), fake_policy("p")))
    for _ in range(5):
        driver.step()
    driver.submit(GenerationRequest("new", (4, 5), SamplingParams(max_tokens=3), fake_policy("p")))
    driver.step()
    driver.step()
    assert driver.tokens["new"] == [6]


def test_running_ahead_with_a_model_gives_the_same_tokens(moe_dir: Path, model: MoeTransformer) -> None:
    """The token that a row continues with comes from the step in flight, whichever row it was there."""
    policies = eight_policies(moe_dir)
    asked = [
        GenerationRequest(
            f"r{i}",
            tuple(prompt),
            SamplingParams(max_tokens=4 + 5 * i, temperature=float(i % 2), seed=i, ignore_eos=i % 3 == 0),
            policies[i],
        )
        for i, prompt in enumerate(random_prompts(8))
    ]
    eos = frozenset(range(60, 90))
    eager, ahead = Driver(assemble_core(model, CONFIG, eos)), Driver(graph_core(model, CONFIG, eos_token_ids=eos))
    for driver in (eager, ahead):
        driver.submit(*asked)
        driver.run()
        assert_idle(driver.core)
    assert ahead.tokens == eager.tokens
    early = [request for request in asked if len(eager.tokens[request.request_id]) < request.sampling.max_tokens]
    assert early, "no sequence ended before its length: the test does not test"
