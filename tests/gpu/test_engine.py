"""The engine on a CUDA device: replayed steps compute what others do, nothing is recaptured, nobody's cache is touched.

bf16 rounds differently for different batch sizes and kernels, so tokens are compared in fp32, where the tiny model's logits are
far apart; bf16 runs are compared with themselves.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import load_model, load_to_serve, read_config, read_policies
from ladimo.model.transformer import MoeTransformer
from ladimo.prefill.random_weights import random_model
from loadtests.common.models import partitioned_config, top_k_policy
from server.engine.batch import Batch
from server.engine.build import assemble_core
from server.engine.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.graphs.cuda_graphs import bucket_sizes
from server.engine.messages import Activate, ExpertSnapshot, ReadExperts
from server.engine.model_runner import ModelRunner
from server.engine.request import GenerationRequest, SamplingParams
from tests.server.engine.graphs import Driver, assert_idle, eight_policies, mixed_requests, random_prompts, rules

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

MOST = 33
CONFIG = EngineConfig(device="cuda", max_num_seqs=MOST, max_step_tokens=4096, max_policies=12, max_model_len=256)


@pytest.fixture(scope="module", autouse=True)
def exact_fp32() -> Iterator[None]:
    """No TF32: greedy decoding is to be comparable between kernels."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def model(moe_dir: Path) -> MoeTransformer:
    return load_model(moe_dir, torch.float32, torch.device("cuda"))


@pytest.fixture(scope="module")
def eager(model: MoeTransformer) -> EngineCore:
    return assemble_core(model, replace(CONFIG, cuda_graphs=False))


@pytest.fixture(scope="module")
def replayed(model: MoeTransformer) -> EngineCore:
    return assemble_core(model, CONFIG)


def counters(core: EngineCore) -> ExpertSnapshot:
    read = core.handle(ReadExperts(0))
    assert isinstance(read, ExpertSnapshot)
    return read


def increase(after: ExpertSnapshot, before: ExpertSnapshot) -> dict[str, list[list[int]]]:
    return {
        name: [
            [new - old for new, old in zip(a, b, strict=True)]
            for a, b in zip(layers, before.expert_tokens.get(name, [[0] * len(row) for row in layers]), strict=True)
        ]
        for name, layers in after.expert_tokens.items()
    }


@pytest.mark.parametrize("count", [*bucket_sizes(MOST), 3, 5, 13])
def test_replay_equals_eager_for_every_bucket_and_random_policies(
    moe_dir: Path, eager: EngineCore, replayed: EngineCore, count: int
) -> None:
    asked = mixed_requests(moe_dir, count)
    policies = eight_policies(moe_dir)
    rng = random.Random(count)
    asked = [replace(request, policy=rng.choice(policies)) for request in asked]
    drivers, chosen = [Driver(eager), Driver(replayed)], []
    for driver in drivers:
        before = counters(driver.core)
        driver.submit(*asked)
        driver.run()
        assert_idle(driver.core)
        chosen.append({name: rows for name, rows in increase(counters(driver.core), before).items() if any(map(any, rows))})
    assert drivers[1].tokens == drivers[0].tokens
    assert chosen[0] == chosen[1]
    decodes = [step for step in drivers[1].steps if step.decode_tokens and not step.prefill_tokens]
    assert decodes and all(step.cuda_graph_bucket is not None for step in decodes)
    assert all(step.cuda_graph_captures == 0 for step in drivers[1].steps[1:])


def decoding(core: EngineCore, requests: list[GenerationRequest]) -> tuple[ModelRunner, Batch]:
    """The engine just before a step in which all of these decode, nothing in flight."""
    driver = Driver(core)
    driver.submit(*requests)
    while not (driver.steps and driver.steps[-1].decode_tokens == len(requests)):
        driver.step()
    if core._flight is not None:
        core._land(core._flight)
        core._flight = None
    assert isinstance(core._runner, ModelRunner)
    return core._runner, core._scheduler.schedule()


def endless(requests: list[GenerationRequest]) -> list[GenerationRequest]:
    sampling = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    return [replace(request, sampling=sampling) for request in requests]


def test_a_table_swapped_between_replays_changes_the_outcome(moe_dir: Path, model: MoeTransformer) -> None:
    runner, batch = decoding(assemble_core(model, CONFIG), endless(mixed_requests(moe_dir, 1)))
    graphs = runner.graphs
    assert graphs is not None
    seen = []
    for policy in eight_policies(moe_dir):
        runner.tables.write(batch.decode[0].rows[0], *policy.to_rows(model.config.max_num_experts))
        replay = runner.launch(batch)()
        seen.append(graphs.buffers.logits[0].clone())
        runner.graphs = None
        plain = runner.launch(batch)()
        runner.graphs = graphs
        assert replay.drawn == plain.drawn
        assert replay.expert_counts == plain.expert_counts
    assert all(not torch.equal(seen[i], seen[j]) for i in range(4) for j in range(i))


def test_padding_touches_nobodys_cache_and_counts_nothing(moe_dir: Path, model: MoeTransformer) -> None:
    runner, batch = decoding(assemble_core(model, CONFIG), endless(mixed_requests(moe_dir, 32)))
    tables, cache, graphs = runner.tables, runner.kv_cache, runner.graphs
    assert graphs is not None
    batch = Batch(decode=batch.decode[:25])  # bucket 32: the last seven rows have been someone else's
    tables_before, k, v = tables.expert_tokens.clone(), cache.k.clone(), cache.v.clone()
    graphs.fill(batch, 32)
    graphs.replay_step(32)
    torch.cuda.synchronize()
    size = runner.block_size
    slots = [s.block_table[s.num_computed // size] * size + s.num_computed % size for s in batch.decode]
    for before, after in ((k, cache.k), (v, cache.v)):
        changed = (before != after).flatten(1, 2).flatten(2).any(dim=-1).any(dim=0).nonzero().flatten().tolist()
        assert set(slots) <= set(changed) <= {*slots, *range(size)}  # the null block is anybody's
    added = tables.expert_tokens - tables_before
    assert (added[0] == 0).all()
    assert added.sum() == (graphs.buffers.expert_ids[:, :25] >= 0).sum() > 0
    assert (graphs.buffers.expert_ids[:, 25:32] == -1).all()


def test_swaps_during_decode_capture_nothing(moe_dir: Path, replayed: EngineCore) -> None:
    driver = Driver(replayed)
    driver.submit(*endless(mixed_requests(moe_dir, 6)))
    alone = Driver(replayed)
    policies = eight_policies(moe_dir)
    captures = replayed._runner.graph_captures
    number = 0
    while driver.core.has_work:
        driver.step()
        driver.handle(Activate(number, (policies[number % 8], policies[(number + 3) % 8])))
        number += 1
    assert replayed._runner.graph_captures == captures
    alone.submit(*endless(mixed_requests(moe_dir, 6)))
    assert alone.run() == driver.tokens


def test_running_ahead_survives_ends_nobody_foresaw(moe_dir: Path, model: MoeTransformer) -> None:
    """End-of-text tokens come at random; blocks are few, so that sequences are preempted, too."""
    eos = frozenset(range(60, 90))
    sizes = replace(CONFIG, max_num_seqs=8, max_model_len=128, kv_cache_blocks=40)
    policies = eight_policies(moe_dir)
    asked = [
        GenerationRequest(
            f"r{i}",
            tuple(prompt),
            SamplingParams(max_tokens=6 + 3 * i, temperature=float(i % 2), seed=i, ignore_eos=i % 3 == 0),
            policies[i % 8],
        )
        for i, prompt in enumerate(random_prompts(16))
    ]
    answers = []
    for graphs in (False, True):
        driver = Driver(assemble_core(model, replace(sizes, cuda_graphs=graphs), eos))
        driver.submit(*asked)
        answers.append(driver.run())
        assert_idle(driver.core)
    assert answers[0] == answers[1]


def test_greedy_equals_transformers(moe_dir: Path, replayed: EngineCore) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(moe_dir, dtype=torch.float32).cuda()
    policy = read_policies(moe_dir, read_config(moe_dir))["full"]
    for index, prompt in enumerate(random_prompts(3)):
        driver = Driver(replayed)
        sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
        driver.submit(GenerationRequest(f"r{index}", tuple(prompt), sampling, policy))
        ids = torch.tensor([prompt], device="cuda")
        expected = theirs.generate(
            ids, max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert driver.run()[f"r{index}"] == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_integer_weights_are_served_from_graphs(moe_dir: Path, format: str) -> None:
    """As the server loads them: replayed steps write what steps without graphs do."""
    answers = []
    for graphs in (False, True):
        model = load_to_serve(moe_dir, "cuda", "float32", format)
        driver = Driver(assemble_core(model, replace(CONFIG, max_num_seqs=8, cuda_graphs=graphs)))
        driver.submit(*endless(mixed_requests(moe_dir, 6)))
        answers.append(driver.run())
        assert_idle(driver.core)
    assert answers[0] == answers[1]


def test_batch_budgets_under_graphs(moe_dir: Path, model: MoeTransformer) -> None:
    policies = [rules(moe_dir, "two", top_k=2, batch_experts=2), rules(moe_dir, "one", top_k=3, batch_experts=1)]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    asked = [GenerationRequest(f"r{i}", tuple(prompt), sampling, policies[i % 2]) for i, prompt in enumerate(random_prompts(6))]
    answers = []
    for graphs in (False, True):
        driver = Driver(assemble_core(model, replace(CONFIG, batch_budgets=True, cuda_graphs=graphs)))
        driver.submit(*asked)
        answers.append((driver.run(), counters(driver.core).distinct_experts))
    assert answers[0] == answers[1]


def test_the_same_request_in_the_same_bucket_writes_the_same_in_bf16() -> None:
    """Whoever the neighbours are. (In another bucket the last bits of a sum may differ, and with them a close decision.)"""
    config = partitioned_config("tiny")
    model = random_model(config, torch.bfloat16, torch.device("cuda"))
    policies = [top_k_policy(config, f"k{k}", k) for k in (1, 2, 4, 8)]
    prompts = random_prompts(8)

    def run(neighbours: int) -> list[int]:
        core = assemble_core(model, replace(CONFIG, max_num_seqs=8), buckets=(8,))
        driver = Driver(core)
        for index in range(8):
            prompt = prompts[0] if index == 3 else prompts[(index + neighbours) % 8][:20]
            sampling = SamplingParams(max_tokens=30, temperature=0.8, seed=5, ignore_eos=True)
            policy = policies[2] if index == 3 else policies[(index + neighbours) % 4]
            driver.submit(GenerationRequest(f"r{index}", tuple(prompt), sampling, policy))
        return driver.run()["r3"]

    assert run(0) == run(1) == run(2)
