"""The real engine on a tiny converted model: what it writes, under which policy, alone and among others."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import read_config, read_policies
from ladimo.policy import RoutingPolicy
from server.engine.async_engine import AsyncEngine
from server.engine.build import build_core
from server.engine.config import EngineConfig
from server.engine.messages import StepStats, TokenEvent
from server.engine.request import GenerationRequest, SamplingParams
from tests.server.engine.graphs import eight_policies, random_prompts

CONFIG = EngineConfig(device="cpu", max_num_seqs=9, block_size=4, max_step_tokens=24, max_policies=12)


@asynccontextmanager
async def running(directory: Path, config: EngineConfig = CONFIG) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(lambda: build_core(directory, config), lambda _: None)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def request(name: str, policy: RoutingPolicy, prompt: list[int], **params: Any) -> GenerationRequest:
    sampling = SamplingParams(**{"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, **params})
    return GenerationRequest(name, tuple(prompt), sampling, policy)


async def events(engine: AsyncEngine, asked: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in engine.generate(asked)]


def ids(answer: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in answer if event.token_id is not None]


async def test_greedy_equals_transformers_under_full(moe_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(moe_dir, dtype=torch.float32)
    policy = read_policies(moe_dir, read_config(moe_dir))["full"]
    async with running(moe_dir) as engine:
        for i, prompt in enumerate(random_prompts(3)):
            mine = ids(await events(engine, request(f"r{i}", policy, prompt)))
            theirs = model.generate(
                torch.tensor([prompt]), max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            assert mine == theirs[0, len(prompt) :].tolist()


async def test_a_request_is_the_same_alone_and_among_seven_other_policies(moe_dir: Path) -> None:
    policies = eight_policies(moe_dir)
    asked = [
        request(f"r{i}", policy, prompt) for i, (policy, prompt) in enumerate(zip(policies, random_prompts(8), strict=True))
    ]
    async with running(moe_dir) as engine:
        alone = [ids(await events(engine, replace(one, request_id=f"alone-{one.request_id}"))) for one in asked]
        together = [ids(answer) for answer in await asyncio.gather(*(events(engine, one) for one in asked))]
    assert together == alone
    # The policies are no decoration: on one prompt they do not all write the same.
    async with running(moe_dir) as engine:
        same_prompt = [ids(await events(engine, request(p.name, p, random_prompts(1)[0]))) for p in policies]
    assert len({tuple(answer) for answer in same_prompt}) > 3


async def test_preemption_changes_no_token(moe_dir: Path) -> None:
    policies = eight_policies(moe_dir)
    asked = [request(f"r{i}", policies[i], prompt) for i, prompt in enumerate(random_prompts(6))]
    small = replace(CONFIG, max_model_len=64, kv_cache_blocks=26)
    async with running(moe_dir, replace(CONFIG, max_model_len=64)) as engine:
        roomy = [ids(await events(engine, one)) for one in asked]
    async with running(moe_dir, small) as engine:
        answers = await asyncio.gather(*(events(engine, one) for one in asked))
        snapshot = await engine.read_experts()
    assert [ids(answer) for answer in answers] == roomy
    needed = sum(len(one.prompt_ids) + 23 for one in asked)
    assert sum(snapshot.routed_tokens.values()) > needed, "nothing was preempted: the test does not test"


async def test_a_cached_prefix_changes_no_token_and_is_never_shared_between_policies(moe_dir: Path) -> None:
    policies = eight_policies(moe_dir)
    prompt = random_prompts(8)[7]
    steps: list[StepStats] = []
    fresh = []
    for policy in policies:
        async with running(moe_dir, replace(CONFIG, prefix_caching=False)) as engine:
            fresh.append(ids(await events(engine, request("r", policy, prompt))))
    engine = AsyncEngine(lambda: build_core(moe_dir, CONFIG), steps.append)
    await engine.start()
    first = [await events(engine, request(f"a{i}", policy, prompt)) for i, policy in enumerate(policies)]
    again = [await events(engine, request(f"b{i}", policy, prompt)) for i, policy in enumerate(policies)]
    snapshot = await engine.read_experts()
    await engine.stop()
    assert [ids(answer) for answer in first] == [ids(answer) for answer in again] == fresh
    cached = (len(prompt) - 1) // CONFIG.block_size * CONFIG.block_size
    assert [answer[0].cached_tokens for answer in first] == [0] * 8
    assert [answer[0].cached_tokens for answer in again] == [cached] * 8
    assert sum(step.prefix_cache_hits for step in steps) == 8 * cached
    assert sum(step.prefix_cache_queries for step in steps) == 16 * len(prompt)
    for policy in policies:
        assert snapshot.routed_tokens[policy.name] == 2 * (len(prompt) + 23) - cached


async def test_sampling_depends_on_the_seed_and_nothing_else(moe_dir: Path) -> None:
    policy = eight_policies(moe_dir)[1]
    prompt = random_prompts(1)[0]
    params = {"temperature": 1.0, "top_p": 0.95}
    async with running(moe_dir) as engine:
        alone = ids(await events(engine, request("alone", policy, prompt, seed=11, **params)))
        crowd = [request(f"r{i}", policy, prompt, seed=11 if i == 2 else i + 100, **params) for i in range(6)]
        answers = [ids(answer) for answer in await asyncio.gather(*(events(engine, one) for one in crowd))]
        unseeded = [ids(await events(engine, request(f"u{i}", policy, prompt, **params))) for i in range(2)]
    assert answers[2] == alone
    assert len({tuple(answer) for answer in answers}) == 6
    assert unseeded[0] != unseeded[1]


async def test_counters_are_exactly_tokens_times_k(moe_dir: Path) -> None:
    policies = eight_policies(moe_dir)[:4]
    layers = read_config(moe_dir).moe_layer_indices
    async with running(moe_dir) as engine:
        asked = [request(f"r{i}", policies[i % 4], prompt) for i, prompt in enumerate(random_prompts(8))]
        answers = await asyncio.gather(*(events(engine, one) for one in asked))
        snapshot = await engine.read_experts()
    for k, policy in enumerate(policies, start=1):
        tokens = sum(len(one.prompt_ids) + 23 for one in asked if one.policy is policy)
        assert snapshot.routed_tokens[policy.name] == tokens
        for layer, counts in enumerate(snapshot.expert_tokens[policy.name]):
            assert sum(counts) == (tokens * k if layer in layers else 0)
    for one, answer in zip(asked, answers, strict=True):
        k = policies.index(one.policy) + 1
        assert answer[-1].experts_per_token == tuple(k if layer in layers else None for layer in range(3))
    steps = {sum(histogram) for layer, histogram in enumerate(snapshot.distinct_experts) if layer in layers}
    assert len(steps) == 1


async def test_dense_checkpoint_is_served_too(dense_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float32)
    policy = read_policies(dense_dir, read_config(dense_dir))["full"]
    prompt = random_prompts(1)[0]
    async with running(dense_dir) as engine:
        answer = await events(engine, request("r", policy, prompt))
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ids(answer) == theirs[0, len(prompt) :].tolist()
    assert answer[-1].experts_per_token == (None, None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"kv_cache_blocks": 3}, "cannot hold one sequence"),
        ({"dtype": "int3"}, "dtype"),
    ],
)
def test_impossible_sizes_are_refused(moe_dir: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_core(moe_dir, replace(CONFIG, **change))
