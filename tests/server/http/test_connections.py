"""Connections as clients, proxies and monitors really use them: upgrades that are not taken up, closed sending sides, HEAD, odd
paths, long silence."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server.api.http.streaming import sse
from tests.server.http.test_access import KEYS
from tests.server.serving import Parts, Server, events, serving, serving_http

BODY = b'{"prompt": "a", "max_tokens": 3}'
JSON = {"Content-Type": "application/json"}
STREAM = b'{"prompt": "a", "max_tokens": 3, "stream": true}'


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.client.base_url.port)
    try:
        async with asyncio.timeout(10):
            yield reader, writer
    finally:
        writer.close()


async def reply(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The next final answer with a Content-Length."""
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        if int(head.split()[1]) >= 200:
            break
    length = next(int(line.partition(b":")[2]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
    return int(head.split()[1]), await reader.readexactly(length)


def request(*headers: bytes, body: bytes = BODY, chunked: bool = False) -> bytes:
    if chunked:
        cut = len(body) // 2
        parts = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:cut], body[cut:], b""))
        framing, body = b"Transfer-Encoding: chunked", parts
    else:
        framing = b"Content-Length: %d" % len(body)
    lines = [b"POST /v1/completions HTTP/1.1", b"Host: x", b"Content-Type: application/json", *headers, framing]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


UPGRADES = [
    (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"),
    (b"Connection: upgrade", b"Upgrade: TLS/1.0"),
    (b"Connection: keep-alive, Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"),
]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("headers", UPGRADES)
@pytest.mark.parametrize("piece", [1, 50, 10_000])
async def test_a_request_that_asks_for_an_upgrade_is_served(
    tmp_path: Path, headers: tuple[bytes, ...], chunked: bool, piece: int
) -> None:
    """Three on one connection, sent without waiting for answers, in pieces of any size; then one that does not ask."""
    async with serving_http(tmp_path) as server, connected(server) as (reader, writer):
        text = 3 * request(*headers, chunked=chunked) + request()
        for begin in range(0, len(text), piece):
            writer.write(text[begin : begin + piece])
            if piece == 1 and begin % 40 == 0:
                await asyncio.sleep(0)
        for _ in range(4):
            status, body = await reply(reader)
            assert (status, json.loads(body)["choices"][0]["text"]) == (200, "bcd")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("wait", [False, True])
async def test_a_client_that_closes_its_sending_side_gets_its_answer(tmp_path: Path, chunked: bool, wait: bool) -> None:
    async with serving_http(tmp_path) as server, connected(server) as (reader, writer):
        release = server.hold_after(0)
        writer.write(request(chunked=chunked))
        if wait:
            await server.submitted(1)
        writer.write_eof()
        if not wait:
            await server.submitted(1)
        await asyncio.sleep(0.5)  # two probes
        release.set()
        status, body = await reply(reader)
        assert (status, json.loads(body)["choices"][0]["text"]) == (200, "bcd")
        assert await reader.read() == b""  # then the server closes


async def test_a_stream_goes_on_after_the_sending_side_is_closed(tmp_path: Path) -> None:
    async with serving_http(tmp_path) as server, connected(server) as (reader, writer):
        release = server.hold_after(1)
        writer.write(request(body=STREAM))
        await reader.readuntil(b"data: ")
        writer.write_eof()
        await asyncio.sleep(0.5)
        release.set()
        rest = await reader.read()
        assert b": waiting" in rest
        assert b"data: [DONE]" in rest


async def test_half_a_request_is_not_waited_for(tmp_path: Path) -> None:
    async with serving_http(tmp_path) as server, connected(server) as (reader, writer):
        writer.write(request()[:-3])
        writer.write_eof()
        assert await reader.read() == b""
        await server.until(lambda: server.connections() == 0)


async def test_an_idle_connection_is_kept_for_as_long_as_the_operator_says(tmp_path: Path) -> None:
    async with serving_http(tmp_path, Parts(keep_alive_timeout=0.2)) as server, connected(server) as (reader, writer):
        writer.write(request())
        await reply(reader)
        assert await reader.read() == b""
    async with serving_http(tmp_path / "long", Parts(keep_alive_timeout=60)) as server, connected(server) as (reader, writer):
        for _ in range(2):
            writer.write(request())
            assert (await reply(reader))[0] == 200
            await asyncio.sleep(0.3)


async def test_a_stream_that_waits_sends_headers_and_comments(tmp_path: Path) -> None:
    async with serving_http(tmp_path, Parts(comment_seconds=0.1)) as server:
        release = server.hold_after(0)
        async with server.client.stream("POST", "/v1/completions", content=STREAM, headers=JSON) as got:
            assert got.status_code == 200
            lines = got.aiter_lines()
            assert [await anext(lines) for _ in range(4)] == [": waiting", "", ": waiting", ""]
            release.set()
            text = "\n".join([line async for line in lines if not line.startswith(":")]).lstrip("\n")
        assert "".join(json.loads(part[6:])["choices"][0]["text"] for part in text.split("\n\n")[:3]) == "bcd"
        assert "data: [DONE]" in text


async def test_what_fails_after_the_headers_is_an_event(tmp_path: Path) -> None:
    async with serving_http(tmp_path, Parts(comment_seconds=0.1, request_timeout=0.5)) as server:
        release = server.hold_after(0)
        got = await server.client.post("/v1/completions", content=STREAM, headers=JSON)
        release.set()
        assert got.status_code == 200
        assert [json.loads(line[6:])["error"]["code"] for line in got.text.splitlines() if line.startswith("data: {")] == [
            "deadline_exceeded"
        ]


async def test_what_fails_before_has_its_own_status(tmp_path: Path) -> None:
    async with serving_http(tmp_path, Parts(comment_seconds=5, request_timeout=0.2)) as server:
        release = server.hold_after(0)
        got = await server.client.post("/v1/completions", content=STREAM, headers=JSON)
        release.set()
        assert (got.status_code, got.json()["error"]["code"]) == (504, "deadline_exceeded")


async def test_a_waiting_stream_whose_client_leaves_is_given_up(tmp_path: Path) -> None:
    async with serving_http(tmp_path, Parts(comment_seconds=0.1)) as server:
        release = server.hold_after(0)
        async with connected(server) as (reader, writer):
            writer.write(request(body=STREAM))
            await reader.readuntil(b": waiting")
        await server.until(lambda: server.services.admission.in_flight == 0)
        release.set()


GETS = ["/", "/health", "/health/live", "/health/ready", "/metrics", "/version", "/v1/models", "/v1/models/tiny", "/v1/routing"]


@pytest.mark.parametrize("path", [*GETS, "/tokenizer_info", "/openapi.json", "/docs", "/static/main.js"])
async def test_head_is_get_without_the_body(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path) as server:
        get, head = await server.client.get(path), await server.client.head(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert get.content
        changing = {"x-request-id", *(["content-length"] if path == "/metrics" else [])}
        assert {k: v for k, v in head.headers.items() if k not in changing} == {
            k: v for k, v in get.headers.items() if k not in changing
        }
        assert "content-length" in head.headers


async def test_head_on_a_socket(tmp_path: Path) -> None:
    async with serving_http(tmp_path) as server:
        for _ in range(2):
            assert (await server.client.head("/v1/models")).status_code == 200
        assert (await server.client.head("/v1/completions")).status_code == 405
        assert (await server.client.head("/nowhere")).status_code == 404


@pytest.mark.parametrize("path", ["/v1/completions/", "//v1/completions", "/v1//completions//", "/v1/completions///"])
async def test_slashes_too_many(tmp_path: Path, path: str) -> None:
    async with serving_http(tmp_path) as server, connected(server) as (reader, writer):
        writer.write(request().replace(b"/v1/completions", path.encode()))
        assert (await reply(reader))[0] == 200


async def test_access_is_checked_on_the_same_path(tmp_path: Path) -> None:
    async with serving_http(tmp_path, KEYS) as server:
        for path, status in [
            ("/health/", 200),
            ("//metrics", 200),
            ("/v1/models/", 401),
            ("//v1//models", 401),
            ("//admin//drain/", 401),
        ]:
            async with connected(server) as (reader, writer):
                writer.write(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path.encode())
                assert int((await reader.read()).split()[1]) == status, path


async def test_no_line_of_a_stream_is_cut_by_any_clients_idea_of_lines(tmp_path: Path) -> None:
    odd = "a\u2028b\u2029c\u0085d\x1ce\x0bf"
    async with serving_http(tmp_path) as server:
        body = {"prompt": odd, "echo": True, "max_tokens": 1, "stream": True, "logprobs": 1}
        async with server.client.stream("POST", "/v1/completions", json=body) as got:
            lines = [line async for line in got.aiter_lines()]
    assert all(line == "" or line.startswith("data: ") for line in lines)
    text = "".join(choice["text"] for event in events("\n".join(lines) + "\n") for choice in event["choices"])
    assert text[:-1] == odd


def test_nor_an_error_event() -> None:
    assert sse({"error": {"message": "\u2028\u2029\u0085é"}}) == (
        b'data: {"error":{"message":"\\u2028\\u2029\\u0085\xc3\xa9"}}\n\n'
    )
