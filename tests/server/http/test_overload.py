"""Deadlines, the limit on waiting prompt tokens, and when refused clients are told to come back."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.api.admission import Rates
from server.app import drain
from server.engine.messages import RequestStats, StepStats
from server.engine.request import FinishReason
from tests.server.serving import MODEL, Parts, Server, events, serving, serving_http


def step(seconds: float, prefill_tokens: int = 0, finished: int = 0) -> StepStats:
    ended = RequestStats("x", "full", FinishReason.STOP, 1, 1, 0, 0.0, 0.0, 0.0, ())
    return StepStats(seconds, prefill_tokens, 1, 1, 0, 0.0, 0, finished=[ended] * finished)


def test_rates_are_of_working_time() -> None:
    rates = Rates()
    assert (rates.sequences_per_second, rates.prompt_tokens_per_second) == (None, None)
    rates.observe(step(0.5, prefill_tokens=100))
    rates.observe(step(1.5, finished=4))
    assert (rates.sequences_per_second, rates.prompt_tokens_per_second) == (2.0, 200.0)


def check(reply: httpx.Response, status: int, code: str) -> None:
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), reply.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limit", ["server", "header", "both"])
async def test_an_answer_that_is_late_is_given_up(tmp_path: Path, stream: bool, limit: str) -> None:
    parts = Parts(request_timeout={"server": 0.05, "header": None, "both": 60.0}[limit])
    headers = {} if limit == "server" else {"X-Request-Timeout": "0.05"}
    async with serving(tmp_path, parts) as server:
        server.runner.gate.clear()
        fields = {"prompt": ["a", "b"], "n": 2, "max_tokens": 30, "stream": stream}
        reply = await server.client.post("/v1/completions", json=fields, headers=headers)
        check(reply, 504, "deadline_exceeded")
        assert reply.headers["x-should-retry"] == "false"
        assert server.services.admission.in_flight == 0
        server.release()
        assert (await server.complete("a", max_tokens=1))["choices"][0]["text"] == "b"
        await server.idle()
        samples = await server.metrics()
        assert samples["ladimo_kv_cache_usage_ratio"] == samples["ladimo_requests_running"] == 0
        assert samples['ladimo_request_failures_total{code="deadline_exceeded"}'] == 1


async def test_a_stream_that_is_late_ends_with_the_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        server.hold_after(2)
        fields = {"prompt": "a", "max_tokens": 30, "stream": True}
        reply = await server.client.post("/v1/completions", json=fields, headers={"X-Request-Timeout": "0.2"})
        *chunks, last = events(reply.text)
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["b", "c"]
        assert last["error"]["code"] == "deadline_exceeded"
        assert server.services.admission.in_flight == 0


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
async def test_a_deadline_must_be_a_time(tmp_path: Path, value: str) -> None:
    async with serving(tmp_path) as server:
        reply = await server.client.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Timeout": value})
        check(reply, 400, "invalid_request")
        assert reply.json()["error"]["param"] == "X-Request-Timeout"


async def held(server: Server, prompt: list[int]) -> "asyncio.Task[dict[str, Any]]":
    """A request of which the engine has not begun to answer."""
    server.runner.gate.clear()
    task = asyncio.create_task(server.complete(prompt, max_tokens=1))
    await server.submitted(1)
    return task


async def test_prompt_tokens_that_wait_are_bounded(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(max_queue_tokens=50)) as server:
        admission = server.services.admission
        first = await held(server, [5] * 60)  # more than the limit, but nothing waits
        second = await server.client.post("/v1/completions", json={"prompt": [5], "max_tokens": 1})
        check(second, 429, "queue_full")
        assert "tokens" in second.json()["error"]["message"]
        assert admission.waiting_tokens == 60
        server.runner.gate.set()
        await first
        assert admission.waiting_tokens == 0
        release = server.hold_after(1)
        fields = {"prompt": [5] * 30, "max_tokens": 20}
        running = asyncio.create_task(server.complete(**fields))  # has its first token, so it waits no more
        await server.submitted(1)
        await server.until(lambda: admission.waiting_tokens == 0)
        waiting = asyncio.create_task(server.complete(**fields))
        await server.until(lambda: admission.waiting_tokens == 30)
        check(await server.client.post("/v1/completions", json=fields), 429, "queue_full")
        small = asyncio.create_task(server.complete([5] * 20, max_tokens=1))
        await server.until(lambda: admission.waiting_tokens == 50)
        release.set()
        await asyncio.gather(running, waiting, small)
        assert (admission.waiting_tokens, admission.in_flight) == (0, 0)


@pytest.mark.parametrize(
    ("observe", "expected"),
    [
        (lambda rates: None, 1),
        (lambda rates: rates.observe(step(1.0, prefill_tokens=2)), 5),  # 60 tokens wait, 50 may: 10 at 2 a second
        (lambda rates: rates.observe(step(1000.0, prefill_tokens=1)), 120),
    ],
)
async def test_retry_after_is_what_waits_over_the_measured_rate(
    tmp_path: Path, observe: Callable[[Rates], None], expected: int
) -> None:
    async with serving(tmp_path, Parts(max_queue_tokens=50)) as server:
        task = await held(server, [5] * 60)
        observe(server.services.admission.rates)
        reply = await server.client.post("/v1/completions", json={"prompt": [5, 5], "max_tokens": 1})
        assert int(reply.headers["retry-after"]) == expected
        server.runner.gate.set()
        await task


async def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        task = await held(server, [5] * 60)
        server.services.admission.rates.observe(step(1.0, prefill_tokens=2))
        fields = {"prompt": "a", "max_tokens": 1}
        reply = await server.client.post("/v1/completions", json=fields, headers={"X-Request-Timeout": "10"})
        check(reply, 429, "queue_full")
        assert int(reply.headers["retry-after"]) == 30
        patient = server.client.post("/v1/completions", json=fields, headers={"X-Request-Timeout": "1000"})
        other = asyncio.create_task(patient)
        await server.submitted(2)
        server.runner.gate.set()
        await asyncio.gather(task, other)
        assert other.result().status_code == 200


class SlowTokenizer:
    """Holds every text back before it is encoded, until `release` is called."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self._go = 0, asyncio.Event()
        self.release = self._go.set
        tokenizer = server.services.language.tokenizer
        encode = tokenizer.encode

        async def slow(*arguments: Any) -> list[int]:
            self.begun += 1
            await self._go.wait()
            return await encode(*arguments)

        monkeypatch.setattr(tokenizer, "encode", slow)


async def test_a_full_server_refuses_before_it_encodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request has its places while its text is encoded."""
    async with serving(tmp_path, Parts(max_queue=0), max_num_seqs=1) as server:
        tokenizer = SlowTokenizer(server, monkeypatch)
        first = asyncio.create_task(server.complete("a", max_tokens=1))
        await server.until(lambda: tokenizer.begun == 1)
        async with asyncio.timeout(60):
            check(await server.client.post("/v1/completions", json={"prompt": "a"}), 429, "queue_full")
        assert tokenizer.begun == 1
        tokenizer.release()
        assert (await first)["choices"][0]["text"] == "b"
        samples = await server.metrics()
        assert samples['ladimo_admission_rejections_total{reason="queue_full"}'] == 1
        assert samples['ladimo_request_failures_total{code="queue_full"}'] == 1


async def test_a_drain_waits_for_texts_that_are_being_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as server:
        tokenizer = SlowTokenizer(server, monkeypatch)
        taken = asyncio.create_task(server.complete("a", max_tokens=1))
        await server.until(lambda: tokenizer.begun == 1)
        draining = asyncio.create_task(drain(server.services.engine, server.services.admission, timeout_seconds=60))
        await server.until(lambda: server.services.admission.draining)
        check(await server.client.post("/v1/completions", json={"prompt": "a"}), 503, "draining")
        tokenizer.release()
        assert (await taken)["choices"][0]["text"] == "b"
        await draining


async def test_a_client_that_leaves_while_its_text_is_encoded_frees_its_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving_http(tmp_path) as server:
        tokenizer = SlowTokenizer(server, monkeypatch)
        asked = asyncio.create_task(server.complete("a", n=3))
        await server.until(lambda: tokenizer.begun == 1)
        assert server.services.admission.in_flight == 3
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await server.until(lambda: server.services.admission.in_flight == 0)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": []}),
        ("/v1/completions", {"prompt": [[]]}),
        ("/v1/completions", {"prompt": [5] * 100}),
        ("/v1/completions", {"prompt": "a" * 10_000}),
        ("/v1/completions", {"prompt": "a", "routing": "unknown"}),
        ("/v1/completions", {"prompt": "a", "best_of": 7}),
        ("/v1/completions", {"prompt": "a", "guided_regex": "("}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"}),
        ("/v1/responses", {"input": "a", "model": "unknown"}),
    ],
)
async def test_a_request_that_is_refused_after_its_admission_frees_its_places(
    tmp_path: Path, path: str, fields: dict[str, Any]
) -> None:
    async with serving(tmp_path) as server:
        reply = await server.client.post(path, json=fields)
        assert reply.status_code in (400, 404), reply.text
        assert (server.services.admission.in_flight, server.services.admission.waiting_tokens) == (0, 0)


async def test_the_official_client_comes_back_when_it_is_told_to(tmp_path: Path) -> None:
    async with serving_http(tmp_path, Parts(max_queue=0), max_num_seqs=1) as server:
        blocker = await held(server, [5])
        base_url = f"{server.client.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=2) as client:
            waiting = asyncio.create_task(client.completions.create(model=MODEL, prompt="a", max_tokens=2))
            rejected = server.services.metrics.admission_rejections.labels("queue_full")
            await server.until(lambda: rejected._value.get() == 1)
            server.runner.gate.set()
            await blocker
            assert (await waiting).choices[0].text == "bc"
            assert rejected._value.get() == 1  # it waited a second, as Retry-After says, and was let in


async def test_the_official_client_does_not_repeat_what_was_too_late(tmp_path: Path) -> None:
    async with serving_http(tmp_path, Parts(request_timeout=0.05)) as server:
        server.runner.gate.clear()
        async with openai.AsyncOpenAI(base_url=f"{server.client.base_url}/v1", api_key="none", max_retries=2) as client:
            with pytest.raises(openai.InternalServerError) as late:
                await client.completions.create(model=MODEL, prompt="a", max_tokens=2)
            assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        assert server.services.metrics.request_failures.labels("deadline_exceeded")._value.get() == 1
