"""Deadlines, the limit on waiting prompt tokens, and when refused clients are told to come back."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.app import drain
from server.policies.costs import StepCosts
from tests.server.serving import MODEL, Parts, Server, events, serving, serving_http


def teach(server: Server, seconds_per_prompt_token: float) -> None:
    """From now on the server believes that prompts take so long, and that decoding takes no time."""
    costs = server.services.admission.meter.costs = StepCosts()
    for tokens in (8, 16, 32, 64):
        costs.observe({}, {1.0: tokens}, tokens * seconds_per_prompt_token)


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


@pytest.mark.parametrize(("seconds_per_token", "expected"), [(0.0, 1), (0.5, 5), (1000.0, 120)])
async def test_retry_after_is_the_time_that_what_waits_takes(tmp_path: Path, seconds_per_token: float, expected: int) -> None:
    async with serving(tmp_path, Parts(max_queue_tokens=50)) as server:
        task = await held(server, [5] * 60)
        teach(server, seconds_per_token)  # 60 tokens wait and 50 may
        reply = await server.client.post("/v1/completions", json={"prompt": [5, 5], "max_tokens": 1})
        assert int(reply.headers["retry-after"]) in (expected, expected + 1)
        server.runner.gate.set()
        await task


async def test_retry_after_is_the_time_until_a_place_is_free(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(max_queue=0), max_num_seqs=2) as server:
        await server.complete("a", max_tokens=20)
        server.runner.gate.clear()
        task = asyncio.create_task(server.complete("a", n=2, max_tokens=20))
        await server.submitted(2)
        costs = server.services.admission.meter.costs = StepCosts()
        for rows in (1, 2, 1, 2):
            costs.observe({1.0: rows}, {}, 1.0)
        reply = await server.client.post("/v1/completions", json={"prompt": "a"})
        assert int(reply.headers["retry-after"]) in (10, 11)  # an answer of 20 tokens; each second brings a token for two
        assert "accuracy" not in reply.json()["error"]
        server.runner.gate.set()
        await task


async def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        task = await held(server, [5] * 60)
        teach(server, 0.5)
        fields = {"prompt": "a", "max_tokens": 1}
        reply = await server.client.post("/v1/completions", json=fields, headers={"X-Request-Timeout": "10"})
        check(reply, 429, "queue_full")
        assert int(reply.headers["retry-after"]) in (30, 31)
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
