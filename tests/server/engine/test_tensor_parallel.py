"""Two processes on the CPU run one model together: the same tokens as one process, and no half-dead server."""

import asyncio
import gc
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ladimo.checkpoint import load_model, read_config, read_policies
from ladimo.model.sharding import Shard
from server.engine import tensor_parallel
from server.engine.async_engine import AsyncEngine, EngineState
from server.engine.build import build_core
from server.engine.config import EngineConfig
from server.engine.messages import EngineDead, Replay, Replayed
from tests.factories import make_nested
from tests.ladimo.stepping import Stepper, make_tables
from tests.server.engine.graphs import eight_policies, random_prompts
from tests.server.engine.test_generation import events, ids, request

ONE = EngineConfig(
    device="cpu", max_num_seqs=9, block_size=4, max_step_tokens=24, max_policies=12, max_model_len=96, shadow_share=1.0
)
TWO = replace(ONE, tensor_parallel_size=2)


@asynccontextmanager
async def running(directory: Path, config: EngineConfig) -> AsyncIterator[tuple[AsyncEngine, asyncio.Queue[Replayed]]]:
    replayed: asyncio.Queue[Replayed] = asyncio.Queue()
    engine = AsyncEngine(lambda: build_core(directory, config), lambda _: None, on_replayed=replayed.put_nowait)
    await engine.start()
    try:
        yield engine, replayed
    finally:
        await engine.stop()


async def answers(directory: Path, engine: AsyncEngine, replayed: asyncio.Queue[Replayed]) -> tuple[object, ...]:
    """What the engine makes of a mixed batch, of a replay, and of prompts that begin like earlier ones."""
    policies = eight_policies(directory)
    asked = [
        request(f"r{i}", policy, prompt) for i, (policy, prompt) in enumerate(zip(policies, random_prompts(8), strict=True))
    ]
    asked.append(request("drawn", policies[0], random_prompts(1)[0], temperature=1.0, seed=3))
    first = [ids(answer) for answer in await asyncio.gather(*(events(engine, each) for each in asked))]
    engine.replay(Replay(asked[1].prompt_ids, tuple(first[1]), policies[1], policies[0]))
    figures = await asyncio.wait_for(replayed.get(), 60)
    again = [replace(each, request_id=f"{each.request_id}-again", prompt_ids=(*each.prompt_ids, 7)) for each in asked]
    second = [ids(answer) for answer in await asyncio.gather(*(events(engine, each) for each in again))]
    return first, second, figures.tokens, figures.agreeing, round(figures.kl, 2)


@pytest.mark.slow
async def test_two_processes_write_what_one_writes_and_end_together(moe_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(moe_dir, ONE) as (engine, replayed):
        one = await answers(moe_dir, engine, replayed)

    workers: list[subprocess.Popen[bytes]] = []
    start = tensor_parallel._start

    def noted(directory: Path, config: EngineConfig, place: Path, shard: Shard) -> "subprocess.Popen[bytes]":
        workers.append(start(directory, config, place, shard))
        return workers[-1]

    monkeypatch.setattr(tensor_parallel, "_start", noted)
    async with running(moe_dir, TWO) as (engine, replayed):
        (worker,) = workers
        for number in (signal.SIGINT, signal.SIGTERM):  # as a terminal or a supervisor sends them to all; the server drains
            worker.send_signal(number)
        assert await answers(moe_dir, engine, replayed) == one
        assert worker.stdin is not None
        worker.stdin.close()  # as when the server is gone
        assert worker.wait(timeout=30) == 0
        with pytest.raises(EngineDead):
            await events(engine, request("late", eight_policies(moe_dir)[0], random_prompts(1)[0]))
        assert engine.state is EngineState.DEAD


@pytest.mark.slow
async def test_two_processes_read_the_bits_of_each_policy(tmp_path: Path) -> None:
    """Compared with torch in one process, because the compiled step rounds activations."""
    gc.collect()  # processes of an earlier test end with their model
    nested = make_nested(tmp_path / "nested", hidden_size=64, intermediate_size=128, num_experts=1)
    policies = read_policies(nested, read_config(nested))
    rules = tuple(rule and replace(rule, refine=1.5) for rule in policies["fast"].layers)
    chosen = [*policies.values(), replace(policies["fast"], name="refined", layers=rules, head_refine=2.0)]
    prompts = random_prompts(len(chosen))
    model = load_model(nested, torch.float32, torch.device("cpu"))
    whole = [
        Stepper(model, make_tables(model, [policy])).greedy(prompt, 24) for policy, prompt in zip(chosen, prompts, strict=True)
    ]
    async with running(nested, TWO) as (engine, _):
        asked = [request(policy.name, policy, prompt) for policy, prompt in zip(chosen, prompts, strict=True)]
        parts = [ids(answer) for answer in await asyncio.gather(*(events(engine, each) for each in asked))]
    assert parts == whole


@pytest.mark.parametrize(
    ("config", "complaint"),
    [(replace(TWO, quantize="int8"), "cannot be combined with quantize"), (TWO, "a part has 16 columns of o_proj")],
)
def test_what_cannot_be_divided_is_refused_before_a_process_starts(
    config: EngineConfig, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_parallel, "_start", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match=f"tensor_parallel_size 2: .*{complaint}"):
        build_core(make_nested(tmp_path / "model"), config)
