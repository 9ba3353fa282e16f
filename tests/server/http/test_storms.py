"""Many clients that leave at random moments; a default that changes all the time: nothing leaks and every count is exact."""

import asyncio
import gc
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import ADMIN, TOP_K, Parts, Server, serving, serving_http

CLIENTS = 500
EXPERT_LAYERS = 2


async def visit(server: Server, number: int, chance: random.Random) -> None:
    """Ask for something, and leave: while it is sent, before the answer, in the middle of it, or after its end.

    Some close their sending side only, and some ask for another protocol.
    """
    moment = chance.choice(["at once", "soon", "in mid-stream", "at the end", "half closed"])
    names = list(TOP_K)
    fields = {
        "prompt": ["a", "hello"][: chance.randint(1, 2)],
        "n": chance.randint(1, 2),
        "max_tokens": chance.randint(1, 40),
        "stream": moment == "in mid-stream" or chance.random() < 0.5,
        "stop": chance.choice([None, "hij"]),
        "routing": names[number % len(names)],
    }
    body = json.dumps(fields).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
    await asyncio.sleep(chance.random() * 0.5)
    assert server.client.base_url.port is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", server.client.base_url.port)
    upgrade = b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n\r\n"
    writer.write(head + chance.choice([b"Connection: close\r\n\r\n", upgrade]) + body)
    if moment == "soon":
        await asyncio.sleep(chance.random() * 0.05)
    elif moment == "in mid-stream":
        await reader.read(1)
    elif moment == "half closed":
        writer.write_eof()
        assert b"HTTP/1.1 200" in await reader.read()
    elif moment == "at the end":
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
    if chance.random() < 0.5:
        writer.transport.abort()
    writer.close()


def total(samples: dict[str, float], name: str) -> float:
    return sum(value for sample, value in samples.items() if sample.startswith(name + "{"))


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Whatever a request holds is given back by code that runs, never by the garbage collector, which may come hours later."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
async def test_500_clients_that_leave_at_random_moments(tmp_path: Path) -> None:
    async with serving_http(
        tmp_path, Parts(max_queue=4 * CLIENTS), max_num_seqs=8, num_blocks=40, max_step_tokens=16
    ) as server:
        admission, chance = server.services.admission, random.Random(7)
        await asyncio.gather(*(visit(server, number, chance) for number in range(CLIENTS)))
        await server.idle()
        # A client that left while it was still sending may be read only now.
        await server.until(lambda: admission.in_flight == 0)
        await server.complete("a", max_tokens=1, routing="full")
        samples = await server.metrics()
        assert (admission.in_flight, admission.waiting_tokens) == (0, 0)
        assert samples["ladimo_requests_running"] == samples["ladimo_requests_waiting"] == 0
        assert samples["ladimo_requests_in_flight"] == 0
        ended = {
            reason: sum(
                v for k, v in samples.items() if k.startswith(f'ladimo_request_success_total{{finish_reason="{reason}"')
            )
            for reason in ("stop", "length", "abort")
        }
        assert all(ended.values()), ended
        assert total(samples, "ladimo_policy_requests_total") <= CLIENTS + 1
        assert (
            total(samples, "ladimo_request_failures_total")
            == samples['ladimo_request_failures_total{code="client_disconnected"}']
        )
        assert samples["ladimo_kv_cache_usage_ratio"] == 0
        # Exactly what the runner computed: top_k experts in each expert layer for each token.
        experts = {
            name: sum(
                value
                for sample, value in samples.items()
                if sample.startswith("ladimo_expert_tokens_total") and f'policy="{name}"' in sample
            )
            for name in TOP_K
        }
        computed = sum(count for batch in server.runner.batches for _, count in batch)
        assert sum(experts[name] / top_k / EXPERT_LAYERS for name, top_k in TOP_K.items()) == computed
        assert len(asyncio.all_tasks()) < 20  # nobody was forgotten


async def test_a_client_that_leaves_after_the_last_token_but_before_it_was_sent_is_counted(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts()) as server:
        body = json.dumps({"prompt": "a", "max_tokens": 8, "stream": True, "routing": "fast"}).encode()
        incoming = iter([{"type": "http.request", "body": body, "more_body": False}])
        stuck, gone = asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            if (message := next(incoming, None)) is not None:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message.get("body"):  # the client reads nothing
                stuck.set()
                await asyncio.Event().wait()

        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
        }
        scope |= {"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": ""}
        scope |= {"headers": [(b"content-type", b"application/json")], "client": None, "server": ("localhost", 80)}
        visit = asyncio.create_task(server.app(scope, receive, send))
        await stuck.wait()
        await server.submitted(0)  # the engine has drawn all tokens
        gone.set()
        await visit
        samples = await server.metrics()
        assert total(samples, "ladimo_policy_requests_total") == 1
        assert samples['ladimo_request_success_total{finish_reason="abort",policy="fast"}'] == 1


@pytest.mark.long
async def test_the_default_changes_hundreds_of_times_a_second_under_load(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(max_queue=100), max_policies=16) as server:
        client, swaps, over = server.client, 0, asyncio.Event()
        versions: dict[str, set[str]] = {name: {policy.version} for name, policy in server.services.store.policies().items()}

        async def swap() -> None:
            nonlocal swaps
            chance = random.Random(1)
            while not over.is_set():
                kind, name = chance.random(), chance.choice(list(TOP_K))
                if kind < 0.2:
                    layer = {"top_k": chance.randint(1, 4), "mass": None, "floor": 0.0, "renormalize": True, "experts": None}
                    body = {"layers": [layer, None, layer]}
                    reply = await client.put("/admin/routing/policies/mine", json=body, headers=ADMIN)
                    versions.setdefault("mine", set()).add(reply.json()["version"])
                    target: dict[str, Any] = {"policy": "mine"}
                else:
                    target = {"policy": name} if kind < 0.7 else {"accuracy": chance.random()}
                reply = await client.put("/admin/routing/default", json=target, headers=ADMIN)
                assert reply.status_code == 200, reply.text
                swaps += 1

        async def ask(number: int) -> dict[str, Any]:
            reply = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 20 + number % 20})
            assert reply.status_code == 200, reply.text
            answer: dict[str, Any] = reply.json()
            return answer

        swapper = asyncio.create_task(swap())
        answers: list[dict[str, Any]] = []
        seen: set[str] = set()
        begin = 0
        # At least five rounds; on a busy machine as many as it takes for enough swaps to fall between answers.
        while begin < 150 or ((swaps < 50 or len(seen) <= 3) and begin < 3000):
            round_ = await asyncio.gather(*(ask(number) for number in range(begin, begin + 30)))
            seen |= {answer["routing"]["version"] for answer in round_}
            answers += round_
            begin += 30
        over.set()
        await swapper
        assert swaps >= 50
        assert len(seen) > 3
        for number, answer in enumerate(answers):
            expected = "".join(chr(ord("b") + place) for place in range(20 + number % 20))
            assert answer["choices"][0]["text"].startswith(expected[:20])
            assert answer["usage"]["completion_tokens"] == 20 + number % 20
            assert answer["routing"]["version"] in versions[answer["routing"]["policy"]]
        # What a policy says is what ran: the fake runner runs top_k experts for every token.
        for answer in answers:
            name = answer["routing"]["policy"]
            if name in TOP_K:
                assert answer["routing"]["experts_per_token"] == TOP_K[name]
        await server.idle()
        samples = await server.metrics()
        assert samples["ladimo_kv_cache_usage_ratio"] == 0
        assert samples['ladimo_policy_swaps_total{result="ok"}'] >= swaps
        assert samples['ladimo_policy_swaps_total{result="failed"}'] == 0
