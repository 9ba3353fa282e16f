"""Keys, hostile paths and hosts, origins of pages, and the size of what comes before a body."""

import asyncio
import hmac
import json
from pathlib import Path
from typing import Any

import pytest

from server.api.http.middleware import MAX_HEAD_BYTES, Keys
from server.app import Access
from tests.server.serving import ADMIN, Parts, Server, serving, serving_http

KEYS = Parts(access=Access(api_keys=["one", "two"], admin_key="admin-key"))


async def raw(server: Server, text: bytes) -> bytes:
    """What the server answers to these bytes on a connection of its own, until it closes or is silent."""
    assert server.client.base_url.port is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", server.client.base_url.port)
    try:
        writer.write(text)
        await writer.drain()
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        length = next(
            int(line.partition(b":")[2]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
        )
        return head + await asyncio.wait_for(reader.readexactly(length), 10)
    finally:
        writer.close()


PATHS = [
    *(
        "/v1/models",
        "//v1/models",
        "/v1/../v1/models",
        "/%76%31/models",
        "/v1%2fmodels",
        "/health/../v1/models",
        "/./v1/models",
    ),
    *("/health%2f..%2fv1/models", "/v1/models?x=/health", "/v1/models#/health", "/v1/models;/health", "/v1/%2e%2e/health"),
    *("http://127.0.0.1/v1/models", "http://health/v1/models", "/tokenizer_info", "/version", "/openapi.json", "/docs"),
    *(
        "/admin/drain",
        "//admin/drain",
        "/admin//drain/",
        "/admin%2f/drain",
        "/%61dmin/drain",
        "/v1/models/",
        "/nowhere",
        "/x/metrics/",
    ),
]


@pytest.mark.parametrize("host", ["127.0.0.1", "x/health?", "127.0.0.1/health#", "/health", "", "metrics"])
async def test_no_path_and_no_host_opens_a_door(tmp_path: Path, host: str) -> None:
    async with serving_http(tmp_path, KEYS) as server:
        for path in PATHS:
            for method in ("GET", "POST", "OPTIONS", "PUT"):
                request = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n"
                status = int((await raw(server, request.encode())).split()[1])
                assert status in (400, 401), (method, path, status)
        assert not server.services.admission.draining


async def test_each_key_opens_and_comparison_takes_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return hmac.compare_digest(left, right)

    monkeypatch.setattr("server.api.http.middleware.compare_digest", compare)
    async with serving(tmp_path, KEYS) as server:
        for key, status in [("one", 200), ("two", 200), ("admin-key", 200), ("on", 401), ("", 401), ("ONE", 401), ("é", 401)]:
            compared.clear()
            headers = {b"Authorization": f"Bearer {key}".encode("latin-1")}
            reply = await server.client.get("/v1/models", headers=headers)
            assert reply.status_code == status, key
            assert len(compared) == 3  # every key, whichever is right
            assert all(len(left) == len(right) == 32 for left, right in compared)  # digests, so lengths say nothing
        basic = await server.client.get("/v1/models", headers={"Authorization": "Basic one"})
        assert basic.status_code == 401
        assert basic.headers["www-authenticate"] == "Bearer"
        assert (await server.client.post("/admin/drain", headers={"Authorization": "Bearer one"})).status_code == 401


def test_keys_are_kept_as_digests_only() -> None:
    async def app(*_: Any) -> None: ...

    keys = Keys(app, ["secret-one"], "secret-two", False)
    assert "secret" not in repr(vars(keys))


async def test_pages_of_other_sites_may_call_only_when_the_operator_says_so(tmp_path: Path) -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    async with serving(tmp_path) as server:
        assert (await server.client.options("/v1/completions", headers=ask)).status_code == 405
        reply = await server.client.get("/v1/models", headers={"Origin": "https://a.example"})
        assert not any(name.startswith("access-control") for name in reply.headers)
    access = Access(api_keys=["one"], allow_origins=["https://a.example"])
    async with serving(tmp_path / "open", Parts(access=access)) as server:
        preflight = await server.client.options("/v1/completions", headers=ask)
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, "https://a.example")
        stranger = await server.client.options("/v1/completions", headers={**ask, "Origin": "https://b.example"})
        assert "access-control-allow-origin" not in stranger.headers
        wrong = await server.client.get("/v1/models", headers={"Origin": "https://a.example"})
        assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (401, "https://a.example")


@pytest.mark.parametrize("size", [MAX_HEAD_BYTES + 1, 2**20, 2**23])
@pytest.mark.parametrize("form", ["one header", "many headers", "path"])
async def test_giant_headers_are_refused_and_the_connection_closed(tmp_path: Path, size: int, form: str) -> None:
    head = {
        "one header": b"GET /health HTTP/1.1\r\nX-Long: " + b"a" * size + b"\r\n",
        "many headers": b"GET /health HTTP/1.1\r\n" + b"X-Many: aaaaaaaaaaaaaaaa\r\n" * (size // 16),
        "path": b"GET /health?" + b"a" * size + b" HTTP/1.1\r\n",
    }[form]
    async with serving_http(tmp_path) as server:
        try:
            reply = await raw(server, head + b"Host: x\r\n\r\n")
        except ConnectionError:  # closed while we were still sending
            reply = b""
        # llhttp itself refuses some of it as malformed before we do.
        assert reply == b"" or int(reply.split()[1]) in (431, 400)
        if form == "one header" and size == MAX_HEAD_BYTES + 1:
            assert b"headers_too_large" in reply
        assert (await server.client.get("/health")).status_code == 200


async def test_headers_that_never_end_are_not_collected(tmp_path: Path) -> None:
    async with serving_http(tmp_path) as server:
        assert server.client.base_url.port is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", server.client.base_url.port)
        writer.write(b"GET /health HTTP/1.1\r\nX-Long: ")

        async def send(pieces: int) -> None:
            for _ in range(pieces):
                writer.write(b"a" * 4096)
                await writer.drain()
                await asyncio.sleep(0)

        with pytest.raises(ConnectionError):
            await send(4096)
        writer.close()


@pytest.mark.parametrize(
    "text", [b"\x16\x03\x01\x02\x00", b"HELO me\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /a b HTTP/1.1\r\n\r\n"]
)
async def test_what_is_not_http_gets_an_error_of_the_usual_shape(tmp_path: Path, text: bytes) -> None:
    async with serving_http(tmp_path) as server:
        head, _, body = (await raw(server, text)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["code"] == "invalid_request"
        assert (await server.client.get("/health")).status_code == 200


async def test_large_bodies_are_no_headers(tmp_path: Path) -> None:
    async with serving_http(tmp_path) as server:
        text = " " * (3 * MAX_HEAD_BYTES)
        for _ in range(3):  # one after the other on one connection
            reply = await server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "pad": text})
            assert reply.status_code == 200


async def test_a_name_twice_in_one_object_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        headers = {**ADMIN, "Content-Type": "application/json"}
        for body in (
            b'{"prompt": "a", "max_tokens": 1, "max_tokens": 9}',
            b'{"prompt": "a", "routing": {"policy": "a", "policy": "b"}}',
        ):
            reply = await server.client.post("/v1/completions", content=body, headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_request")
            assert "twice" in reply.json()["error"]["message"]
