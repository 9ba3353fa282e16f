"""The HTTP side of the deployment: reads each request once, sends it to the replica that suits it, and retries.

A request whose replica dies before the first byte of the answer is sent to another replica. It is computed again from the
start, so the client does not notice. A stream that has begun ends with an error event. Admin requests are not retried, because
the change may have been made.
"""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray.affinity import prefix_keys
from deploy.ray.calls import REPLICA_HEADER, VIEW_HEADER, Call
from deploy.ray.pages import join_pages
from server.api.http.failures import error_response
from server.api.http.middleware import ADMIN_PREFIX, PlainPaths
from server.api.http.streaming import DONE, EventStream, sse, until_disconnect
from server.errors import ClientDisconnected, Conflict, Dead, ServiceError

ATTEMPTS = 3  # a request that kills its replicas must not kill them all
RETRY_AFTER = 5
DRAIN = f"{ADMIN_PREFIX}drain"
RESPONSES = "/v1/responses"
PROMPT_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", RESPONSES})

logger = logging.getLogger(__name__)

Ask = Callable[[Call], AsyncGenerator[list[Message], None]]


class ReplicaLost(Exception):
    """The replica that computed an answer has died, or cannot be reached."""


class Gateway:
    """An ASGI application. `ask`: sends a call to a replica and yields its messages; raises ReplicaLost. `read_pages`: the
    metrics page of each replica. `max_body_bytes`: more of a body is not read, and the replica refuses it."""

    def __init__(
        self,
        ask: Ask,
        read_pages: Callable[[], Awaitable[Mapping[str, str]]],
        max_body_bytes: int,
        attempts: int = ATTEMPTS,
    ) -> None:
        self._ask, self._read_pages = ask, read_pages
        self._max_body_bytes, self._attempts = max_body_bytes, attempts
        self.view = 0  # the newest version of the policy view that an answer has had

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        try:
            if path == "/metrics":
                page = Response(join_pages(await self._read_pages()), media_type=CONTENT_TYPE_LATEST)
                await page(scope, receive, send)
                return
            if path == DRAIN:
                raise Conflict("Ray Serve drains replicas itself; change their number, or run `serve shutdown`")
            with suppress(ClientDisconnect, ClientDisconnected):
                call = await self._read(request, path)
                await until_disconnect(request, self._forward(call, send))
        except ServiceError as error:
            await error_response(error)(scope, receive, send)

    async def _read(self, request: Request, path: str) -> Call:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_body_bytes:
                break
        headers = request.headers
        keys = prefix_keys(path, headers, bytes(body), self.view) if path in PROMPT_PATHS else ()
        client = None if request.client is None else (request.client.host, request.client.port)
        return Call(request.method, path, request.scope["query_string"], list(headers.raw), client, bytes(body), keys)

    async def _forward(self, call: Call, send: Send) -> None:
        """Send the call until a replica answers it. Raises Dead if none does."""
        attempts = 1 if call.path.startswith(ADMIN_PREFIX) else self._attempts
        for left in reversed(range(attempts)):
            answer = _Answer(call, send)
            try:
                async with aclosing(self._ask(call)) as messages:
                    async for some in messages:
                        for message in some:
                            await answer.take(message)
                            if left and answer.status == Dead.status and not answer.begun:
                                raise ReplicaLost("it is not ready")
                self.view = max(self.view, answer.view)
                return
            except ReplicaLost as error:
                logger.warning("%s %s: its replica was lost (%s); attempts left: %d", call.method, call.path, error, left)
                if answer.begun:
                    await answer.cut()
                    return
                call = replace(call, avoid=call.avoid | answer.replicas)
        if attempts == 1:
            raise Dead("the replica died; whether the change was made is shown by GET /v1/routing", retry_after=RETRY_AFTER)
        raise Dead("the replicas that computed this request died", retry_after=RETRY_AFTER)


class _Answer:
    """The answer of one replica on its way to the client. Its start is held back until the first part of the body. So an answer
    of which only the start has come can still be replaced by that of another replica."""

    def __init__(self, call: Call, send: Send) -> None:
        self._call, self._send = call, send
        self._start: Message | None = None
        self._headers = Headers()
        self.begun = self._complete = False  # whether the client has got anything, and all

    @property
    def status(self) -> int:
        return 0 if self._start is None else int(self._start["status"])

    @property
    def replicas(self) -> frozenset[str]:
        """The name of the replica, if it is known."""
        return frozenset(self._headers.getlist(REPLICA_HEADER))

    @property
    def view(self) -> int:
        return int(self._headers.get(VIEW_HEADER, 0))

    async def take(self, message: Message) -> None:
        """The next message of the replica."""
        if message["type"] == "http.response.start":
            self._headers = Headers(raw=message["headers"])
            # Ray Serve adds this header itself, with the same id.
            headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
            self._start = {**message, "headers": headers}
            return
        if not self.begun:
            assert self._start is not None
            self.begun = True
            await self._send(self._start)
        await self._send(message)
        self._complete = not message.get("more_body", False)

    async def cut(self) -> None:
        """End an answer whose replica is lost. Raises ReplicaLost if only a closed connection can show that it broke off."""
        if self._complete:
            return
        if not self._headers.get("content-type", "").startswith(EventStream.media_type):
            raise ReplicaLost("the rest of an answer is lost")
        error = Dead("the replica that computed this answer died", retry_after=RETRY_AFTER).to_dict()
        if self._call.path == RESPONSES:
            event = sse({"type": "error", **error["error"], **error}, "error")
        else:
            event = sse(error) + DONE
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def make_app(gateway: Gateway) -> ASGIApp:
    """The gateway behind the path rules of the server."""
    return Starlette(routes=[Mount("/", gateway)], middleware=[Middleware(PlainPaths)])
