"""Bodies: how they may be packed, that they are parsed once, and that a large one holds nobody up."""

import asyncio
import gc
import gzip
import http.client
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from loadtests.costs.stall_bench import worst_bodies
from server.api.http import bodies
from server.api.http.bodies import JsonRoute
from server.api.http.json_reader import read_json
from server.api.routes import completions, ops, routing
from server.app import Access
from tests.server.http.test_bad_input import check_error
from tests.server.serving import CONTEXT, Parts, Server, serving, serving_http

# One of each kind: refused while it is parsed, while it is validated, and answered.
WORST = [
    "objects in an unknown field",
    "a bias for every number",
    "one prompt of ids",
    "one prompt of wrong ids",
    "prompts of ids that fit",
]
JSON = {"Content-Type": "application/json"}
GOOD = b'{"prompt": "a", "max_tokens": 1}'
# How long the event loop may be held up. Without threads the same bodies hold it for seconds.
HELD_SECONDS = 1.5


@pytest.fixture
def settled_memory() -> Iterator[None]:
    """The garbage collector passes over what is there already, as in a server that has started."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("pad", [0, 2 * bodies.INLINE_BYTES])
async def test_a_body_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pad: int) -> None:
    parsed: list[int] = []

    def counted(body: bytes) -> Any:
        parsed.append(len(body))
        return read_json(body)

    def forbidden(*_: object, **__: object) -> Any:
        raise AssertionError("parsed again")

    monkeypatch.setattr(bodies, "read_json", counted)
    body = json.dumps({"prompt": "a", "max_tokens": 1, "pad": "x" * pad}).encode()
    async with serving(tmp_path) as server:
        monkeypatch.setattr("json.loads", forbidden)
        reply = await server.client.post("/v1/completions", content=body, headers=JSON)
        monkeypatch.undo()
        assert reply.json()["choices"][0]["text"] == "b"
        assert parsed == [len(body)]


def test_every_route_with_a_body_takes_the_parsed_one() -> None:
    routes = [route for each in (completions, routing, ops) for route in each.router.routes] + routing.admin.routes
    with_body = [route for route in routes if isinstance(route, APIRoute) and route.body_field is not None]
    assert len(with_body) >= 6
    assert all(isinstance(route, JsonRoute) for route in with_body)


@pytest.mark.parametrize("large", [False, True])
async def test_errors_are_the_same_in_a_thread(tmp_path: Path, large: bool) -> None:
    pad = "x" * (2 * bodies.INLINE_BYTES if large else 1)
    async with serving(tmp_path) as server:
        wrong: list[tuple[dict[str, Any], str, str | None]] = [
            ({"temperature": "hot"}, "invalid_request", "temperature"),
            ({"suffix": "b"}, "unsupported_parameter", "suffix"),
            ({"stop": ["a", 3]}, "invalid_request", "stop[1]"),
            ({"stream_options": {}}, "invalid_request", None),
        ]
        for fields, code, param in wrong:
            reply = await server.client.post("/v1/completions", json={"prompt": "a", "pad": pad, **fields})
            check_error(reply, 400, code, param)
        check_error(await server.client.post("/v1/completions", json=[pad]), 400, "invalid_request", None)


@pytest.mark.parametrize("place", [0, 5000, 20_000])
async def test_the_place_of_a_wrong_id_in_a_long_list(tmp_path: Path, place: int) -> None:
    tokens = [5] * 20_001
    tokens[place] = -1
    async with serving(tmp_path) as server:
        check_error(
            await server.client.post("/detokenize", json={"tokens": tokens}), 400, "invalid_request", f"tokens[{place}]"
        )


@pytest.mark.parametrize(
    ("coding", "pack"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("GZIP", gzip.compress), ("deflate", zlib.compress)],
)
async def test_packed_bodies(tmp_path: Path, coding: str, pack: Any) -> None:
    async with serving(tmp_path) as server:
        headers = {**JSON, "Content-Encoding": coding}
        reply = await server.client.post("/v1/completions", content=pack(GOOD), headers=headers)
        assert reply.json()["choices"][0]["text"] == "b", reply.text


def packed(body: bytes) -> bytes:
    """The same bytes at any time: they name the test."""
    return gzip.compress(body, mtime=0)


@pytest.mark.parametrize(
    ("coding", "body", "status", "code"),
    [
        ("br", GOOD, 415, "unsupported_media_type"),
        ("gzip, gzip", packed(packed(GOOD)), 415, "unsupported_media_type"),
        ("gzip", GOOD, 400, "invalid_request"),
        ("gzip", packed(GOOD)[:-4], 400, "invalid_request"),
        ("gzip", packed(GOOD) + packed(GOOD), 400, "invalid_request"),
    ],
)
async def test_packed_bodies_that_are_refused(tmp_path: Path, coding: str, body: bytes, status: int, code: str) -> None:
    async with serving(tmp_path) as server:
        reply = await server.client.post("/v1/completions", content=body, headers={**JSON, "Content-Encoding": coding})
        check_error(reply, status, code, "Content-Encoding")
        if status == 415:
            assert coding in reply.json()["error"]["message"]
            assert reply.headers["accept-encoding"] == "gzip, deflate"


async def test_a_packed_body_is_bounded_unpacked(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(access=Access(max_body_bytes=2000))) as server:
        headers = {**JSON, "Content-Encoding": "gzip"}
        bomb = gzip.compress(b'{"prompt": "' + b"a" * 10**6 + b'"}')
        assert len(bomb) < 2000
        check_error(await server.client.post("/v1/completions", content=bomb, headers=headers), 413, "body_too_large", None)


async def test_a_byte_order_mark_is_skipped_and_a_plain_coding_accepted(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        headers = {**JSON, "Content-Encoding": "identity"}
        reply = await server.client.post("/v1/completions", content=b"\xef\xbb\xbf" + GOOD, headers=headers)
        assert reply.json()["choices"][0]["text"] == "b"


def send(server: Server, body: bytes) -> int:
    """The answer's status. Blocks, so it belongs on a thread."""
    headers = {**JSON, **({"Content-Encoding": "gzip"} if body.startswith(b"\x1f\x8b") else {})}
    connection = http.client.HTTPConnection("127.0.0.1", server.client.base_url.port or 0, timeout=60)
    try:
        connection.request("POST", "/v1/completions", body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.usefixtures("settled_memory")
async def test_the_worst_bodies_hold_up_no_stream(tmp_path: Path) -> None:
    async with serving_http(tmp_path) as server:
        longest, over = 0.0, False

        async def stream() -> None:
            """A client that streams all the time, on the server's event loop."""
            nonlocal longest
            last = time.perf_counter()
            while not over:
                body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": True}
                async with server.client.stream("POST", "/v1/completions", json=body) as reply:
                    async for _ in reply.aiter_raw():
                        now = time.perf_counter()
                        longest, last = max(longest, now - last), now

        streaming = asyncio.create_task(stream())
        waits = {}
        worst = worst_bodies(int(7.7 * 2**20), CONTEXT)
        for name in WORST:
            longest = 0.0
            assert await asyncio.to_thread(send, server, worst[name]) in (200, 400, 413, 429), name
            waits[name] = longest
        over = True
        await streaming
        assert max(waits.values()) < HELD_SECONDS, waits
