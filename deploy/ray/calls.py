"""A request as the gateway sends it to a replica, and how a replica runs it through its ASGI application."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope

REPLICA_HEADER, VIEW_HEADER = "X-Replica", "X-Routing-View"


@dataclass(frozen=True, slots=True)
class Call:
    """An HTTP request with its whole body. `keys`: of its prompt (`affinity.prefix_keys`). `avoid`: replicas that could not
    answer it."""

    method: str
    path: str
    query: bytes = b""
    headers: Sequence[tuple[bytes, bytes]] = ()
    client: tuple[str, int] | None = None
    body: bytes = b""
    keys: tuple[bytes, ...] = ()
    avoid: frozenset[str] = frozenset()

    def scope(self) -> Scope:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
            "state": {},
        }


async def run(app: ASGIApp, call: Call) -> AsyncGenerator[list[Message], None]:
    """Yield the application's messages, always all that are there. Closing the generator cancels the application."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    unread = [call.body]

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()  # one per wait: a cancelled wait cancels it
        return await never

    async def answer() -> None:
        try:
            await app(call.scope(), receive, messages.put)
        finally:
            messages.put_nowait(None)

    task = asyncio.create_task(answer())
    try:
        over = False
        while not over:
            ready = [await messages.get()]
            while not messages.empty():
                ready.append(messages.get_nowait())
            over = ready[-1] is None
            if some := [message for message in ready if message is not None]:
                yield some
        await task
    finally:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
