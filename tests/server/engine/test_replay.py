"""Replays: right figures, only when there is nothing else to do, and nothing that requests could notice."""

import asyncio
import threading
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ladimo.checkpoint import load_model
from ladimo.model.inputs import StepInputs
from ladimo.model.transformer import MoeTransformer
from server.engine.async_engine import AsyncEngine
from server.engine.build import assemble_core, build_core
from server.engine.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.messages import ReadExperts, Replay, Replayed
from server.engine.policy_table import PolicyTable
from server.engine.replay import MAX_PENDING, STEP_TOKENS, Replayer
from server.engine.request import GenerationRequest, SamplingParams
from tests.server.engine.graphs import assert_idle, eight_policies, random_prompts
from tests.server.fakes import fake_core, fake_policy

CONFIG = EngineConfig(device="cpu", block_size=4, max_model_len=96, shadow_share=1.0)


@pytest.fixture(scope="module")
def model(moe_dir: Path) -> MoeTransformer:
    return load_model(moe_dir, torch.float32, torch.device("cpu"))


def replay(core: EngineCore, answer: Replay) -> Replayed:
    assert core.handle(answer) is None
    for _ in range(100):
        found = core.spare_step()
        if found is not None:
            assert not core.has_spare_work
            return found
    raise AssertionError("the replay does not end")


def expected(model: MoeTransformer, answer: Replay) -> tuple[int, float]:
    """Agreeing tokens and the sum of the divergence, computed in one pass without a cache."""
    table = PolicyTable(model.config, 4, torch.device("cpu"))
    tokens = torch.tensor([[*answer.prompt_ids, *answer.output_ids[:-1]]])
    drawing = slice(len(answer.prompt_ids) - 1, None)
    logps = []
    for row in table.acquire((answer.policy, answer.reference)) or ():
        with torch.inference_mode():
            logits = model.forward(StepInputs.whole_sequences(tokens, row), None, table.tables).logits
        logps.append(logits[drawing].log_softmax(dim=-1))
    own, reference = logps
    agreeing = int((own.argmax(-1) == reference.argmax(-1)).sum())
    return agreeing, F.kl_div(own, reference, reduction="sum", log_target=True).item()


@pytest.mark.parametrize(("prompt", "output"), [(1, 1), (2, 1), (STEP_TOKENS, 3), (STEP_TOKENS + 1, 2), (50, 40)])
def test_the_figures_are_those_of_both_policies_on_the_answer(
    moe_dir: Path, model: MoeTransformer, prompt: int, output: int
) -> None:
    policies = eight_policies(moe_dir)
    tokens = [token for each in random_prompts(8) for token in each]
    answer = Replay(tuple(tokens[:prompt]), tuple(tokens[prompt : prompt + output]), policies[0], policies[3])
    for core in (assemble_core(model, CONFIG), build_core(moe_dir, CONFIG)):  # in torch, and as it is served
        found = replay(core, answer)
        agreeing, kl = expected(model, answer)
        assert (found.policy, found.version, found.tokens) == ("k1", policies[0].version, output)
        assert found.agreeing == agreeing
        assert found.kl == pytest.approx(kl, rel=1e-3)


def test_a_replay_takes_no_block_and_counts_no_expert(moe_dir: Path, model: MoeTransformer) -> None:
    policies = eight_policies(moe_dir)
    core = assemble_core(model, CONFIG)
    free, before = core._scheduler.blocks.num_free, core.handle(ReadExperts(0))
    replay(core, Replay(tuple(random_prompts(8)[7]), (1, 2, 3), policies[1], policies[3]))
    assert core._scheduler.blocks.num_free == free
    after = core.handle(ReadExperts(0))
    assert before is not None and after is not None
    assert all(not any(sum(layers, [])) for layers in after.expert_tokens.values())  # type: ignore[union-attr]
    assert after.routed_tokens == before.routed_tokens == {}  # type: ignore[union-attr]
    assert_idle(core)


def test_without_a_share_there_is_neither_memory_nor_work(model: MoeTransformer) -> None:
    core = assemble_core(model, EngineConfig(device="cpu", block_size=4, max_model_len=96))
    assert (core._replayer, core.limits.max_replay_tokens) == (None, 0)


def test_new_answers_displace_the_oldest(moe_dir: Path, model: MoeTransformer) -> None:
    policies = eight_policies(moe_dir)
    core = assemble_core(model, CONFIG)
    for number in range(MAX_PENDING + 5):
        core.handle(Replay((1,), (2,) * (1 + number), policies[0], policies[3]))
    found = []
    while core.has_spare_work:
        if (replayed := core.spare_step()) is not None:
            found.append(replayed.tokens)
    assert found == list(range(6, MAX_PENDING + 6))


class EndlessReplays(Replayer):
    """Has always work. Each step waits for `turn`, and writes to `log`."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.turn, self.begun = log, threading.Semaphore(0), threading.Event()
        self.has_any = True
        self.error: Exception | None = None

    @property
    def has_work(self) -> bool:
        return self.has_any

    def add(self, answer: Replay) -> None:
        raise AssertionError

    def step(self) -> Replayed | None:
        self.begun.set()
        self.turn.acquire()
        if self.error is not None:
            raise self.error
        self.log.append("replay")
        return None


async def test_a_request_waits_for_one_short_step_and_then_runs_undisturbed() -> None:
    core, runner = fake_core()
    log: list[str] = []
    replayer = core._replayer = EndlessReplays(log)
    execute = runner.execute
    runner.execute = lambda batch: (log.append("request"), execute(batch))[1]  # type: ignore[method-assign,func-returns-value]
    engine = AsyncEngine(lambda: core, lambda _: None, quiet_seconds=0.2)
    await engine.start()
    try:
        await asyncio.to_thread(replayer.begun.wait)
        request = GenerationRequest("r", (1, 2), SamplingParams(max_tokens=5), fake_policy("p"))
        events = asyncio.create_task(anext_all(engine, request))
        while engine._mailbox.empty():
            await asyncio.sleep(0.001)
        replayer.turn.release(100)
        assert await events == 5
        assert log[:6] == ["replay", *["request"] * 5]
        replayer.begun.clear()
        await asyncio.to_thread(replayer.begun.wait, 30)  # it goes on after a while
        assert replayer.begun.is_set()
    finally:
        replayer.has_any = False
        replayer.turn.release(1000)
        await engine.stop()


async def anext_all(engine: AsyncEngine, request: GenerationRequest) -> int:
    return len([event async for event in engine.generate(request)])


async def test_a_failing_replay_does_not_touch_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    core, _ = fake_core()
    replayer = core._replayer = EndlessReplays([])
    replayer.error = RuntimeError("no memory")
    replayer.turn.release()
    engine = AsyncEngine(lambda: core, lambda _: None, quiet_seconds=0)
    await engine.start()
    try:
        async with asyncio.timeout(30):
            while core.has_spare_work:
                await asyncio.sleep(0.001)
        assert await anext_all(engine, GenerationRequest("r", (1,), SamplingParams(max_tokens=3), fake_policy("p"))) == 3
        assert "nothing is replayed from now on" in caplog.text
    finally:
        await engine.stop()
