"""Streams of server-sent events, and waiting for work. Both stop when the client leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from server.api.http.http_protocol import HALF_CLOSED, PROBE_SECONDS
from server.errors import ClientDisconnected

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"


# Unicode's line ends, besides the control characters that JSON escapes anyway. Clients that split text at these would cut an
# event in two.
LINE_ENDS = str.maketrans({0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"})


def sse(value: object, name: str | None = None) -> bytes:
    """One event of a stream. Its data is on one line, also for clients that split at Unicode line ends. `name`: its type."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    line = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return head + b"data: " + (line if line.isascii() else line.translate(LINE_ENDS)).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """A stream of events. After `comment_seconds` without an event it sends a comment, because some proxies close a connection
    without traffic.

    `source`: the generator from which the events are made. `first`: the wait for its first item. Both are closed when the
    response ends, however it ends. The generator of events cannot close them, because it may never have started.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        source: AsyncGenerator[Any, None],
        first: "asyncio.Future[Any]",
        comment_seconds: float,
    ) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._source, self._first, self._comment_seconds = events, source, first, comment_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        now = asyncio.get_running_loop().time
        sent = now()

        async def send_in_time(message: Message) -> None:
            nonlocal sent
            sent = now()
            await send(message)

        async def comment() -> None:
            while True:
                await asyncio.sleep(sent + self._comment_seconds - now())
                if now() >= sent + self._comment_seconds:
                    await send_in_time({"type": "http.response.body", "body": COMMENT, "more_body": True})

        async def probe() -> None:
            """Send comments to a client that has closed its sending side, to find out whether it still reads."""
            half_closed = scope["state"].get(HALF_CLOSED)
            if half_closed is not None:
                await half_closed.wait()
                for seconds in (0.0, *PROBE_SECONDS):
                    await asyncio.sleep(seconds)
                    await send_in_time({"type": "http.response.body", "body": COMMENT, "more_body": True})

        commenting = asyncio.gather(comment(), probe())
        try:
            await super().__call__(scope, receive, send_in_time)
        finally:
            commenting.cancel()
            self._first.cancel()
            await asyncio.gather(commenting, self._first, return_exceptions=True)
            await self._events.aclose()
            await self._source.aclose()


async def started(request: Request, source: AsyncGenerator[T, None], seconds: float) -> "asyncio.Future[T]":
    """A future with the source's first item. Waits for it at most `seconds`.

    Raises the source's errors until then, and ClientDisconnected. In these cases it closes the source, which would otherwise
    stay open until the garbage collector runs.
    """
    first: asyncio.Task[T] = asyncio.ensure_future(anext(source))
    try:
        await until_disconnect(request, asyncio.wait({first}, timeout=seconds))
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await source.aclose()
        raise
    return first


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Await `work`. If the client leaves before its end, cancel it, wait until it has ended, and raise ClientDisconnected."""
    task = asyncio.ensure_future(work)
    listener = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, listener}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected("the client closed the connection")
    finally:
        task.cancel()
        listener.cancel()
        await asyncio.gather(task, listener, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
