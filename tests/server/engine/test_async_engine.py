"""The engine thread as asyncio sees it: streams, aborts, activation, death."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ladimo.policy import RoutingPolicy
from server.engine.async_engine import AsyncEngine, EngineState
from server.engine.core import EngineCore
from server.engine.messages import EngineDead, PolicyTableFull, StepStats
from server.engine.request import FinishReason, GenerationRequest, SamplingParams
from tests.server.fakes import FakeRunner, fake_core, fake_policy


@asynccontextmanager
async def running(**sizes: Any) -> AsyncIterator[tuple[AsyncEngine, FakeRunner, list[StepStats]]]:
    core, runner = fake_core(**sizes)
    steps: list[StepStats] = []
    engine = AsyncEngine(lambda: core, steps.append)
    await engine.start()
    try:
        yield engine, runner, steps
    finally:
        runner.gate.set()
        await engine.stop()


def request(
    name: str, start: int = 0, length: int = 5, policy: RoutingPolicy | None = None, **params: Any
) -> GenerationRequest:
    sampling = SamplingParams(**{"max_tokens": 8, **params})
    return GenerationRequest(name, tuple(range(start, start + length)), sampling, policy or fake_policy("full"))


async def tokens(engine: AsyncEngine, asked: GenerationRequest) -> list[int | None]:
    return [event.token_id async for event in engine.generate(asked)]


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.002)
    pytest.fail("did not happen within four seconds")


async def test_each_request_gets_its_own_tokens_and_measured_experts() -> None:
    async with running() as (engine, _, steps):
        asked = [request(f"r{i}", start=i * 3, policy=fake_policy(f"k{i % 3 + 1}", i % 3 + 1)) for i in range(12)]
        answers = await asyncio.gather(*(tokens(engine, one) for one in asked))
        assert answers == [list(range(i * 3 + 5, i * 3 + 13)) for i in range(12)]
        await eventually(lambda: sum(len(step.finished) for step in steps) == 12)
        for stats in (stats for step in steps for stats in step.finished):
            top_k = int(stats.policy[1])
            assert list(stats.experts_per_token) == [top_k, None, top_k]
            assert (stats.prompt_tokens, stats.generation_tokens, stats.finish_reason) == (5, 8, FinishReason.LENGTH)
        snapshot = await engine.read_experts()
        for name, routed in snapshot.routed_tokens.items():
            assert routed == 4 * (5 + 8 - 1)  # the last token is never computed
            assert sum(snapshot.expert_tokens[name][0]) == routed * int(name[1])
            assert sum(snapshot.expert_tokens[name][1]) == 0
        assert sum(sum(step.generation_tokens.values()) for step in steps) == 12 * 8
        assert sum(sum(step.prompt_tokens.values()) for step in steps) == 12 * 5
        assert sum(len(step.first_token_seconds) for step in steps) == 12
        assert sum(len(step.inter_token_seconds) for step in steps) == 12 * 7


async def test_stop_tokens_and_end_of_text_end_a_request() -> None:
    async with running(eos_token_ids=frozenset({9})) as (engine, _, steps):
        assert await tokens(engine, request("eos")) == [5, 6, 7, 8, 9]
        assert await tokens(engine, request("ignored", ignore_eos=True)) == list(range(5, 13))
        assert await tokens(engine, request("stop", stop_token_ids=frozenset({6}))) == [5, 6]
        await eventually(lambda: sum(len(step.finished) for step in steps) == 3)
        reasons = [stats.finish_reason for step in steps for stats in step.finished]
        assert reasons == [FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP]


@pytest.mark.parametrize("received", [0, 1, 3])
async def test_closing_the_stream_aborts(received: int) -> None:
    async with running() as (engine, runner, steps):
        runner.let(received)
        stream = engine.generate(request("gone", max_tokens=50))
        for _ in range(received):
            await anext(stream)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()
        runner.gate.set()
        await eventually(lambda: any(step.finished for step in steps))
        (stats,) = [stats for step in steps for stats in step.finished]
        assert stats.finish_reason is FinishReason.ABORT
        assert stats.generation_tokens <= received + 1  # the step that was held had begun
        assert (steps[-1].running, steps[-1].waiting, steps[-1].kv_cache_usage_ratio) == (0, 0, 0.0)


async def test_finish_counts_as_stop() -> None:
    async with running() as (engine, runner, steps):
        runner.let(1)
        stream = engine.generate(request("text", max_tokens=50))
        await anext(stream)
        engine.finish("text")
        await stream.aclose()
        runner.gate.set()
        await eventually(lambda: any(step.finished for step in steps))
        assert [stats.finish_reason for step in steps for stats in step.finished] == [FinishReason.STOP]


async def test_activation_keeps_policies_and_reports_a_full_table() -> None:
    async with running(max_policies=2) as (engine, runner, _):
        await engine.activate([fake_policy("a"), fake_policy("b")])
        assert await tokens(engine, request("c", policy=fake_policy("c"))) == list(range(5, 13))
        assert await tokens(engine, request("a", policy=fake_policy("a"))) == list(range(5, 13))
        with pytest.raises(PolicyTableFull):
            await engine.activate([fake_policy(name) for name in "abc"])
        await engine.activate([fake_policy("c")])
        assert await tokens(engine, request("c2", policy=fake_policy("c"))) == list(range(5, 13))


async def test_a_failed_step_ends_everything() -> None:
    async with running() as (engine, runner, _):
        runner.gate.clear()
        streams = [asyncio.ensure_future(tokens(engine, request(f"r{i}"))) for i in range(6)]
        await asyncio.sleep(0.01)
        call = asyncio.ensure_future(engine.read_experts())
        await asyncio.sleep(0.01)
        runner.fail_with = RuntimeError("device lost")
        runner.gate.set()
        assert isinstance(await engine.wait_dead(), RuntimeError)
        results = await asyncio.gather(*streams, call, return_exceptions=True)
        assert all(isinstance(result, EngineDead) for result in results)
        assert engine.state is EngineState.DEAD
        with pytest.raises(EngineDead):
            await tokens(engine, request("late"))
        with pytest.raises(EngineDead):
            await engine.activate([])


async def test_what_building_raises_comes_out_of_start() -> None:
    def build() -> EngineCore:
        raise ValueError("no such checkpoint")

    engine = AsyncEngine(build, lambda _: None)
    with pytest.raises(ValueError, match="no such checkpoint"):
        await engine.start()
    assert engine.state is EngineState.DEAD
    await engine.stop()


async def test_stop_ends_streams_and_the_idle_loop_keeps_beating() -> None:
    async with running() as (engine, runner, _):
        before = engine.heartbeat
        await eventually(lambda: engine.heartbeat > before)
        runner.gate.clear()
        stream = asyncio.ensure_future(tokens(engine, request("r", max_tokens=50)))
        await asyncio.sleep(0.01)
        stopping = asyncio.ensure_future(engine.stop())
        await asyncio.sleep(0.01)
        runner.gate.set()
        await stopping
        assert await engine.wait_dead() is None
        with pytest.raises(EngineDead):
            await stream
