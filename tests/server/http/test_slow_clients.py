"""Clients that send, or read, as slowly as they can: their connections end, and nothing is held for them."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from server.app import Access
from tests.server.serving import Parts, Server, serving_http

SOON = 0.3  # seconds; what is waited for is always the end of the connection, never this time
SLOW_HEADERS = Parts(header_timeout=SOON)
SLOW_BODIES = Parts(access=Access(body_timeout=SOON))


class Connection:
    """A connection that this test writes byte by byte, and reads as it likes."""

    def __init__(self, server: Server) -> None:
        self._port = server.client.base_url.port

    async def __aenter__(self) -> "Connection":
        # Small buffers, so that what is not read stays with the server.
        connected = socket.socket()
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connected.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connected, ("127.0.0.1", self._port))
        self.reader, self.writer = await asyncio.open_connection(sock=connected, limit=1024)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def end(self) -> bytes:
        """What comes until the server closes."""
        data = b""
        try:
            async with asyncio.timeout(10):
                while piece := await self.reader.read(1024):
                    data += piece
        except ConnectionError:
            pass
        return data

    async def trickle(self, piece: bytes) -> None:
        """Send a byte now and then for as long as the server takes any."""
        async with asyncio.timeout(10):
            try:
                while not self.reader.at_eof():
                    self.writer.write(piece)
                    await self.writer.drain()
                    await asyncio.sleep(0.01)
            except ConnectionError:
                pass

    async def reply(self) -> tuple[int, str]:
        """Status and error code of the last answer before the end."""
        head, _, body = (await self.end()).partition(b"\r\n\r\n")
        assert b"connection: close" in head.lower()
        return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize("trickles", [False, True])
@pytest.mark.parametrize("begun", [b"G", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_headers_that_do_not_end_are_answered_408(tmp_path: Path, begun: bytes, trickles: bool) -> None:
    async with serving_http(tmp_path, SLOW_HEADERS) as server, Connection(server) as connection:
        connection.writer.write(begun)
        if trickles and begun.endswith(b": "):
            sender = asyncio.create_task(connection.trickle(b"a"))
            assert b"request_timeout" in await connection.end()
            await sender
        else:
            assert await connection.reply() == (408, "request_timeout")
        assert (await server.client.get("/health")).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"\r\n"])
async def test_a_connection_that_asks_nothing_is_closed_without_a_word(tmp_path: Path, sent: bytes) -> None:
    async with serving_http(tmp_path, SLOW_HEADERS) as server, Connection(server) as connection:
        sender = asyncio.create_task(connection.trickle(sent)) if sent else None
        assert await connection.end() == b""
        if sender is not None:
            await sender


async def test_a_second_request_on_a_connection_has_the_same_time(tmp_path: Path) -> None:
    async with serving_http(tmp_path, SLOW_HEADERS) as server, Connection(server) as connection:
        connection.writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await connection.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        connection.writer.write(b"GET /heal")
        assert b" 408 " in await connection.end()


async def test_more_of_a_refused_body_does_not_keep_the_connection(tmp_path: Path) -> None:
    parts = Parts(header_timeout=SOON, access=Access(max_body_bytes=1024))
    async with serving_http(tmp_path, parts) as server, Connection(server) as connection:
        connection.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
        sender = asyncio.create_task(connection.trickle(b" "))
        assert (await connection.end()).startswith(b"HTTP/1.1 413")
        await sender


async def test_a_long_answer_outlives_the_time_for_headers(tmp_path: Path) -> None:
    async with serving_http(tmp_path, Parts(header_timeout=0.05)) as server:
        release = server.hold_after(0)
        answer = asyncio.create_task(server.complete("a", max_tokens=3))
        await server.until(lambda: server.services.admission.in_flight == 1)
        async with Connection(server) as connection:
            await connection.end()  # as long as headers may take
        release.set()
        assert (await answer)["choices"][0]["text"] == "bcd"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("trickles", [False, True])
async def test_bodies_that_do_not_end_are_answered_408(tmp_path: Path, chunked: bool, trickles: bool) -> None:
    async with serving_http(tmp_path, SLOW_BODIES) as server, Connection(server) as connection:
        length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 1000"
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + length + b"\r\n\r\n"
        connection.writer.write(head + (b"1\r\n{\r\n" if chunked else b"{"))
        if trickles:
            sender = asyncio.create_task(connection.trickle(b"1\r\n \r\n" if chunked else b" "))
            assert b"request_timeout" in await connection.end()
            await sender
        else:
            assert await connection.reply() == (408, "request_timeout")
        samples = await server.metrics()
        assert samples['ladimo_request_failures_total{code="request_timeout"}'] == 1


# Long events: the text is the same, the log-probabilities of 20 rivals come with each token.
LONG = {"prompt": ["a"] * 4, "max_tokens": 60, "ignore_eos": True, "logprobs": 20}


async def ask(connection: Connection, **fields: Any) -> None:
    body = json.dumps({**LONG, **fields}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    connection.writer.write(head % len(body) + body)
    await connection.writer.drain()


async def test_a_stream_that_nobody_reads_is_cut_and_its_places_are_free(tmp_path: Path) -> None:
    async with serving_http(tmp_path, Parts(send_timeout=SOON, max_queue=0)) as server, Connection(server) as connection:
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await ask(connection, stream=True)
        admission = server.services.admission
        await server.until(lambda: admission.in_flight == 4)
        assert (await server.client.post("/v1/completions", json={"prompt": "a"})).status_code == 429
        await server.until(lambda: admission.in_flight == 0)
        await server.idle()
        samples = await server.metrics()
        assert samples["ladimo_kv_cache_usage_ratio"] == samples["ladimo_requests_running"] == 0
        assert (await server.complete("a", max_tokens=1))["choices"][0]["text"] == "b"
        connection.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert b"[DONE]" not in await connection.end()


@pytest.mark.parametrize("logprobs", [6, 20])  # less, and more, than the transport keeps before it says stop
async def test_an_answer_that_nobody_reads_is_cut(tmp_path: Path, logprobs: int) -> None:
    async with serving_http(tmp_path, Parts(send_timeout=SOON)) as server, Connection(server) as connection:
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await ask(connection, logprobs=logprobs)
        await server.until(lambda: server.connections() == 1)
        await server.until(lambda: server.connections() == 0)
        assert server.services.admission.in_flight == 0


async def test_a_client_that_pauses_and_goes_on_reads_everything(tmp_path: Path) -> None:
    async with serving_http(tmp_path) as server, Connection(server) as connection:
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await ask(connection, stream=True)
        await server.until(lambda: server.services.admission.in_flight == 4)
        await server.until(lambda: len(server.runner.batches) >= 60)
        connection.writer.transport.resume_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(10):
            while await connection.reader.readline() != b"data: [DONE]\n":
                pass
