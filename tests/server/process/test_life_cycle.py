"""Loading, overload, clients that leave, draining and death."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import drain
from server.engine.core import EngineCore
from tests.server.fakes import Clock
from tests.server.serving import ADMIN, Parts, Server, events, serving, serving_http

BODY = {"prompt": "a", "max_tokens": 60}


def check_unavailable(reply: httpx.Response, code: str) -> None:
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, code)
    assert int(reply.headers["retry-after"]) >= 1


async def test_http_answers_while_the_model_loads(tmp_path: Path) -> None:
    gate = threading.Event()

    def build(core: EngineCore) -> EngineCore:
        gate.wait()
        return core

    async with serving(tmp_path, Parts(build=build, wait_ready=False)) as server:
        try:
            check_unavailable(await server.client.post("/v1/completions", json=BODY), "loading")
            check_unavailable(await server.client.get("/health/ready"), "loading")
            check_unavailable(
                await server.client.put("/admin/routing/default", json={"policy": "fast"}, headers=ADMIN), "loading"
            )
            for path in ("/", "/health", "/health/live", "/metrics", "/v1/models", "/v1/routing"):
                assert (await server.client.get(path)).status_code == 200
        finally:
            gate.set()
        await server.until(lambda: server.services.engine.state == "ready")
        assert (await server.client.get("/health/ready")).status_code == 200
        assert (await server.complete("a", max_tokens=1))["choices"][0]["text"] == "b"


async def test_a_model_that_does_not_load_is_reported(tmp_path: Path) -> None:
    def build(core: EngineCore) -> EngineCore:
        raise ValueError("no such weights")

    async with serving(tmp_path, Parts(build=build)) as server:
        await server.until(lambda: bool(server.died))
        assert str(server.died[0]) == "no such weights"
        check_unavailable(await server.client.get("/health/live"), "engine_dead")
        check_unavailable(await server.client.post("/v1/completions", json=BODY), "engine_dead")


async def test_overload_is_answered_at_once_and_counted(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(max_queue=2), max_num_seqs=2) as server:
        server.runner.gate.clear()
        held = [asyncio.create_task(server.complete(**BODY)) for _ in range(4)]
        await server.submitted(4)
        for _ in range(3):
            reply = await server.client.post("/v1/completions", json=BODY)
            assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
            assert reply.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(reply.headers["retry-after"]) <= 120
        too_many = await server.client.post("/v1/completions", json={"prompt": ["a"] * 5})
        assert too_many.status_code == 400
        server.runner.gate.set()
        assert len(await asyncio.gather(*held)) == 4
        assert (await server.complete("a", max_tokens=1))["usage"]["completion_tokens"] == 1
        samples = await server.metrics()
        assert samples['ladimo_admission_rejections_total{reason="queue_full"}'] == 3
        assert samples['ladimo_request_failures_total{code="queue_full"}'] == 3


async def leave(server: Server, phase: str, fields: dict[str, Any], choices: int) -> None:
    """Send a request for so many choices on a connection of its own and close it in the given phase."""
    release = server.hold_after(1 if phase == "streaming" else 0)
    async with httpx.AsyncClient(base_url=server.client.base_url) as client:
        if phase == "streaming":
            async with client.stream("POST", "/v1/completions", json={**fields, "stream": True}) as reply:
                assert (await anext(reply.aiter_lines())).startswith("data: {")
        else:
            body = {**fields, "stream": phase == "before the first token"}
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            await server.submitted(choices)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    await server.until(lambda: server.services.admission.in_flight == 0)
    release.set()


@pytest.mark.parametrize("phase", ["before the first token", "streaming", "whole answer"])
@pytest.mark.parametrize("asked", [{"prompt": "a"}, {"prompt": ["a", "b", "c"]}, {"prompt": "a", "n": 3}])
async def test_a_client_that_leaves_frees_everything(tmp_path: Path, phase: str, asked: dict[str, Any]) -> None:
    async with serving_http(tmp_path, max_num_seqs=2, max_step_tokens=4) as server:
        choices = 1 if asked == {"prompt": "a"} else 3
        await leave(server, phase, {**asked, "max_tokens": 60, "ignore_eos": True}, choices)
        await server.complete("a", max_tokens=1)
        samples = await server.metrics()
        assert samples["ladimo_requests_running"] == samples["ladimo_requests_waiting"] == 0
        assert samples["ladimo_kv_cache_usage_ratio"] == 0
        assert samples['ladimo_request_success_total{finish_reason="abort",policy="full"}'] == choices
        assert samples['ladimo_request_success_total{finish_reason="length",policy="full"}'] == 1
        assert samples['ladimo_generation_tokens_total{policy="full"}'] < 60 * choices


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failed_step_ends_every_request_and_is_told(tmp_path: Path, stream: bool) -> None:
    async with serving(tmp_path) as server:
        server.runner.gate.clear()
        fields = {**BODY, "stream": stream}
        held = [asyncio.create_task(server.client.post("/v1/completions", json=fields)) for _ in range(3)]
        await server.submitted(3)
        failure = RuntimeError("secret detail")
        server.runner.fail_with = failure
        server.runner.gate.set()
        for reply in await asyncio.gather(*held):
            check_unavailable(reply, "engine_dead")
            assert "secret" not in reply.text
        await server.until(lambda: server.died == [failure])
        check_unavailable(await server.client.get("/health/ready"), "engine_dead")
        check_unavailable(await server.client.get("/health"), "engine_dead")
        check_unavailable(await server.client.post("/v1/completions", json=BODY), "engine_dead")
        assert (await server.client.get("/metrics")).status_code == 200


async def test_a_failed_step_in_mid_stream_is_an_error_event_and_done(tmp_path: Path) -> None:
    async with serving_http(tmp_path) as server:
        release = server.hold_after(2)
        text = ""
        async with server.client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as reply:
            assert reply.status_code == 200
            async for chunk in reply.aiter_text():
                text += chunk
                server.runner.fail_with = RuntimeError("broken")
                release.set()
        *chunks, last = events(text)
        assert 1 <= len(chunks) <= 3
        assert last["error"]["code"] == "engine_dead"
        await server.until(lambda: len(server.died) == 1)
        assert (await server.metrics())['ladimo_request_failures_total{code="engine_dead"}'] == 1


async def test_a_stuck_step_is_not_alive_and_a_long_prompt_is(tmp_path: Path) -> None:
    clock = Clock()
    async with serving(tmp_path, Parts(stall_timeout=10.0, clock=clock), max_step_tokens=1) as server:

        async def alive() -> bool:
            return (await server.client.get("/health/live")).status_code == 200

        steps = server.step_by_step()
        answer = asyncio.create_task(server.complete([5] * 40, max_tokens=1))
        for _ in range(39):  # a prompt of 40 steps of 9 seconds each
            await steps.begun()
            clock.now += 9
            assert await alive()
            steps.go()
        await steps.begun()
        clock.now += 11
        assert not await alive()
        assert (await server.client.get("/health")).json()["error"]["code"] == "engine_dead"
        steps.go()
        await answer
        await server.until_async(alive)


async def test_drain_finishes_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        server.runner.gate.clear()
        held = asyncio.create_task(server.complete(**BODY))
        await server.submitted(1)
        reply = await server.client.post("/admin/drain", headers=ADMIN)
        assert reply.json() == {"draining": True, "running": 1}
        check_unavailable(await server.client.post("/v1/completions", json=BODY), "draining")
        check_unavailable(await server.client.get("/health/ready"), "draining")
        assert (await server.client.get("/health/live")).status_code == 200
        waiting = asyncio.create_task(drain(server.services.engine, server.services.admission, timeout_seconds=60))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        server.runner.gate.set()
        await waiting
        assert (await held)["usage"]["completion_tokens"] == 60
        assert server.died == []


async def test_drain_cuts_off_after_its_timeout(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        server.runner.gate.clear()
        held = asyncio.create_task(server.client.post("/v1/completions", json={**BODY, "stream": True}))
        await server.submitted(1)
        waiting = asyncio.create_task(drain(server.services.engine, server.services.admission, timeout_seconds=0))
        await asyncio.sleep(0.05)
        server.runner.gate.set()
        await waiting
        reply = await held
        assert reply.status_code == 503 or events(reply.text)[-1]["error"]["code"] == "engine_dead"
        assert server.died == []


async def test_a_bug_in_a_route_is_a_500_without_details(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as server:

        def broken(*_: object) -> None:
            raise KeyError("secret detail")

        with monkeypatch.context() as patch:
            patch.setattr("server.api.routes.completions.make_generation", broken)
            reply = await server.client.post("/v1/completions", json=BODY, headers={"X-Request-Id": "mine-1"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in reply.text
        assert reply.headers["x-request-id"] == "mine-1"
        assert (await server.complete("a", max_tokens=1))["choices"][0]["text"] == "b"
