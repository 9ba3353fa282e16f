"""The gateway: answers pass through unchanged, and a lost replica costs no request that has not begun to be answered."""

import asyncio
import gzip
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from deploy.ray.affinity import prefix_keys
from deploy.ray.calls import Call, run
from deploy.ray.gateway import Gateway, ReplicaLost, make_app
from deploy.ray.pages import join_pages

BODY = {"prompt": "a long prompt " * 40}
Answer = Sequence[list[Message] | type[ReplicaLost]]


def start(status: int = 200, replica: str = "a", kind: str = "application/json", view: int = 1) -> Message:
    names = {"content-type": kind, "x-replica": replica, "x-routing-view": str(view), "x-request-id": "1"}
    headers = [(name.encode(), value.encode()) for name, value in names.items()]
    return {"type": "http.response.start", "status": status, "headers": headers}


def part(text: str, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


class Replicas:
    """What the replicas do with one call after another."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.calls: list[Call] = []

    async def ask(self, call: Call) -> AsyncGenerator[list[Message], None]:
        self.calls.append(call)
        for messages in self._answers.pop(0):
            if isinstance(messages, type):
                raise messages("dead")
            yield messages


def client(replicas: Replicas, max_body_bytes: int = 10_000, pages: Mapping[str, str] | None = None) -> httpx.AsyncClient:
    async def read_pages() -> Mapping[str, str]:
        return pages or {}

    app = make_app(Gateway(replicas.ask, read_pages, max_body_bytes))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here")


async def test_the_answer_of_a_replica_is_passed_on() -> None:
    replicas = Replicas([[start(404)], [part("half ", more=True), part("whole")]])
    async with client(replicas) as http:
        reply = await http.post("/v1/completions?x=1", json=BODY, headers={"X-Request-Id": "7"})
    assert (reply.status_code, reply.text, reply.headers["x-replica"]) == (404, "half whole", "a")
    assert "x-request-id" not in reply.headers  # Ray Serve adds it
    (call,) = replicas.calls
    assert (call.method, call.path, call.query, json.loads(call.body)) == ("POST", "/v1/completions", b"x=1", BODY)
    assert (b"x-request-id", b"7") in call.headers


async def test_a_request_without_an_answer_is_sent_to_another_replica() -> None:
    """Also if the replica had only announced its answer, and if it is not ready."""
    whole = [[start(replica="c"), part("{}")]]
    replicas = Replicas([ReplicaLost], [[start(200, "a")], ReplicaLost], whole)
    async with client(replicas) as http:
        reply = await http.post("/v1/completions", json=BODY)
        assert (reply.status_code, reply.text) == (200, "{}")
        assert [sorted(call.avoid) for call in replicas.calls] == [[], [], ["a"]]
        replicas = Replicas([[start(503, "a"), part("loading")]], whole)
    async with client(replicas) as http:
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        assert replicas.calls[1].avoid == {"a"}


async def test_a_request_that_kills_three_replicas_gets_an_error() -> None:
    replicas = Replicas([ReplicaLost], [ReplicaLost], [ReplicaLost])
    async with client(replicas) as http:
        reply = await http.post("/v1/completions", json=BODY)
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "engine_dead" and reply.headers["retry-after"]
    replicas = Replicas(*[[[start(503), part("loading")]]] * 3)
    async with client(replicas) as http:
        assert (await http.post("/v1/completions", json=BODY)).text == "loading"


@pytest.mark.parametrize(("path", "last"), [("/v1/chat/completions", "[DONE]"), ("/v1/responses", '"code":"engine_dead"')])
async def test_a_stream_that_has_begun_ends_with_an_error(path: str, last: str) -> None:
    replicas = Replicas([[start(kind="text/event-stream"), part('data: {"n":1}\n\n', more=True)], ReplicaLost])
    async with client(replicas) as http:
        reply = await http.post(path, json=BODY)
    events = reply.text.strip().split("\n\n")
    assert events[0] == 'data: {"n":1}' and '"engine_dead"' in events[1] and last in events[-1]
    assert len(replicas.calls) == 1


async def test_a_whole_answer_that_breaks_off_closes_the_connection() -> None:
    replicas = Replicas([[start(), part('{"n":', more=True)], ReplicaLost])
    async with client(replicas) as http:
        with pytest.raises(ReplicaLost):
            await http.get("/v1/models")


async def test_a_replica_that_dies_after_its_answer_does_not_matter() -> None:
    replicas = Replicas([[start(kind="text/event-stream"), part("data: [DONE]\n\n")], ReplicaLost])
    async with client(replicas) as http:
        assert (await http.post("/v1/completions", json=BODY)).text == "data: [DONE]\n\n"


async def test_an_admin_request_is_sent_once() -> None:
    replicas = Replicas([ReplicaLost])
    async with client(replicas) as http:
        reply = await http.post("/admin//routing/rollback/")
    assert reply.status_code == 503 and "GET /v1/routing" in reply.json()["error"]["message"]
    assert [call.path for call in replicas.calls] == ["/admin/routing/rollback"]


async def test_keys_have_the_version_of_the_view_that_answers_show() -> None:
    replicas = Replicas(*[[[start(view=3), part("{}")]]] * 2)
    async with client(replicas) as http:
        for view in (0, 3):
            await http.post("/v1/completions", content=json.dumps(BODY))
            assert replicas.calls[-1].keys == prefix_keys("/v1/completions", {}, json.dumps(BODY).encode(), view) != ()


async def test_other_requests_have_no_keys() -> None:
    replicas = Replicas(*[[[start(), part("{}")]]] * 2)
    async with client(replicas) as http:
        await http.post("/tokenize", json=BODY)
        compressed = gzip.compress(json.dumps(BODY).encode())
        await http.post("/v1/completions", content=compressed, headers={"Content-Encoding": "gzip"})
    assert [call.keys for call in replicas.calls] == [(), ()]
    assert replicas.calls[1].body == compressed


async def test_of_a_body_that_is_too_large_only_the_beginning_is_kept() -> None:
    async def parts() -> AsyncGenerator[bytes, None]:
        for _ in range(1000):
            yield b"x" * 1000

    replicas = Replicas([[start(413), part("too large")]])
    async with client(replicas, max_body_bytes=5000) as http:
        assert (await http.post("/v1/completions", content=parts())).status_code == 413
    assert len(replicas.calls[0].body) > 5000


async def test_draining_is_left_to_ray_serve() -> None:
    async with client(Replicas()) as http:
        reply = await http.post("/admin/drain")
    assert reply.status_code == 409 and "serve shutdown" in reply.json()["error"]["message"]


async def test_the_metrics_of_all_replicas_are_one_page() -> None:
    page = """\
# HELP x_total Things.
# TYPE x_total counter
x_total{kind="a}b"} 1.0
x_total 2.0
# HELP y Other.
# TYPE y gauge
y 3.0
"""
    expected = """\
# HELP x_total Things.
# TYPE x_total counter
x_total{replica="a",kind="a}b"} 1.0
x_total{replica="a"} 2.0
x_total{replica="b"} 5.0
# HELP y Other.
# TYPE y gauge
y{replica="a"} 3.0
"""
    other = "# HELP x_total Things.\n# TYPE x_total counter\nx_total 5.0\n"
    async with client(Replicas(), pages={"b": other, "a": page}) as http:
        reply = await http.get("/metrics")
    assert reply.text == expected == join_pages({"a": page, "b": other})
    assert reply.headers["content-type"].startswith("text/plain; version=")


async def test_a_client_that_leaves_cancels_its_call() -> None:
    ended = asyncio.Event()

    async def ask(call: Call) -> AsyncGenerator[list[Message], None]:
        try:
            yield [start(kind="text/event-stream"), part("data: 1\n\n", more=True)]
            await asyncio.sleep(3600)
        finally:
            ended.set()

    async def no_pages() -> Mapping[str, str]:
        return {}

    sent: list[Message] = []
    unread: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        while not sent:
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async with asyncio.timeout(20):
        await make_app(Gateway(ask, no_pages, 1000))(Call("POST", "/v1/completions").scope(), receive, send)
    assert ended.is_set() and [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


async def test_closing_an_answer_cancels_the_application() -> None:
    heard: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append((await receive())["body"])
        await send(start())
        await send(part("1", more=True))
        try:
            await receive()
        finally:
            heard.append("the end")

    messages = run(app, Call("POST", "/v1/completions", body=b"{}"))
    assert [message["type"] for message in await anext(messages)] == ["http.response.start", "http.response.body"]
    await messages.aclose()
    assert heard == [b"{}", "the end"]


async def test_an_application_s_error_is_the_caller_s() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        [message async for message in run(app, Call("GET", "/"))]
