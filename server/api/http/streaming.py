"""Answers that stop computing when the client leaves: server-sent events, and the wait before an answer begins."""

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


# What Unicode counts as line ends, besides the control characters that JSON escapes anyway. Clients that split lines as Unicode
# does would cut an event in two.
LINE_ENDS = str.maketrans({0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"})


def sse(value: object, name: str | None = None) -> bytes:
    """One event of a stream, its data on one line whichever way a client splits lines. `name`: its type, if it has one."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    line = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return head + b"data: " + (line if line.isascii() else line.translate(LINE_ENDS)).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """A stream of events, and a comment whenever nothing was sent for `comment_seconds`: a proxy that sees nothing would close
    the connection.

    `source`, which the events are made from, is closed when the response ends, however it ends (a generator that was never
    started would not close it); so is `first`, the wait for its first item.
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
            """Find out whether a client that sends no more still reads."""
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
    """The source's first item, there or still awaited after so many seconds.

    Raises what the source raises until then, and ClientDisconnected. The source is closed then: its first item may have come in
    the moment in which the client left, and it would wait for the garbage collector.
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
    """Await `work`; when the client leaves first, cancel it, wait until it is over and raise ClientDisconnected."""
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
