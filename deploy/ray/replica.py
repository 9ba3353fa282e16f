"""One replica: a whole server without a socket, which follows the common view of the policies."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import Any, Protocol

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from deploy.ray.autoscaling import objective_pressure
from deploy.ray.calls import REPLICA_HEADER, VIEW_HEADER, Call, run
from deploy.ray.view import Order, Report, View
from server.api.http.failures import to_service_error
from server.api.http.middleware import ADMIN_PREFIX
from server.api.services import Services
from server.app import Access, create_app
from server.errors import Conflict, Unavailable
from server.policies.state import State

RETRY_SECONDS = 1.0  # between two attempts to reach the holder of the view

logger = logging.getLogger(__name__)


class Holder(Protocol):
    """`view.PolicyView`, which may run in another process. Every call may raise HolderLost."""

    async def join(self, replica: str, offered: View) -> View: ...
    async def leave(self, replica: str) -> None: ...
    async def exchange(self, replica: str, report: Report) -> Order | None: ...
    async def change(self, base: int, state: dict[str, object]) -> str | None: ...
    async def status(self) -> dict[str, Any]: ...


class HolderLost(Exception):
    """The holder of the view cannot be reached now."""


class Replica:
    """`name`: in the header X-Replica and in the list of replicas. `start` must be awaited before all else."""

    def __init__(self, name: str, services: Services, access: Access, holder: Holder) -> None:
        self._name, self._holder = name, holder
        self._services = services = replace(services, share_policies=self._share)
        self._changes = services.policy_changes
        self._report = Report(version=0)
        self._behind: Exception | None = None  # why the current view could not be installed
        self._resources = AsyncExitStack()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._app = create_app(services, access, on_ready=lambda: self._started(None), on_dead=self._started)
        self._app.add_api_route("/v1/replicas", self._status, methods=["GET"], summary="The policy view of each replica.")

    async def start(self) -> None:
        """Load the engine, install the view, and follow it. Raises what keeps the engine from starting or serving the view."""
        async with AsyncExitStack() as resources:
            await resources.enter_async_context(self._app.router.lifespan_context(self._app))
            await self._ready
            await self._join()
            resources.push_async_callback(_end, asyncio.create_task(self._follow()))
            self._resources = resources.pop_all()

    async def stop(self) -> None:
        """Leave the view and stop the engine."""
        with suppress(HolderLost):
            await self._holder.leave(self._name)
        await self._resources.aclose()

    async def http(self, call: Call) -> AsyncGenerator[list[Message], None]:
        """The server's answer to a call, as ASGI messages."""
        async for messages in run(self._named, call):
            yield messages

    async def check(self) -> None:
        """Raises RuntimeError if the engine is dead or stalled, or if it cannot serve the current view."""
        if self._behind is not None:
            raise RuntimeError(f"the policy view cannot be installed: {self._behind}")
        async for messages in run(self._app, Call("GET", "/health/live")):
            if messages[0].get("status", 200) != 200:
                raise RuntimeError("the engine is dead or stalled")

    async def metrics(self) -> tuple[str, str]:
        """The replica's name and its metrics page."""
        messages = [message async for some in run(self._app, Call("GET", "/metrics")) for message in some]
        return self._name, b"".join(message.get("body", b"") for message in messages).decode()

    def pressure(self) -> float:
        """See `objective_pressure`."""
        return objective_pressure(self._services.automatic_control.status(), self._services.store.price_at)

    async def _named(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The server, with headers that name the replica and the version of the view under which the request began. The answer
        to a change has the version that it made."""
        began, changes = self._report.version, scope["path"].startswith(ADMIN_PREFIX)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[REPLICA_HEADER], headers[VIEW_HEADER] = self._name, str(self._report.version if changes else began)
            await send(message)

        await self._app(scope, receive, send_named)

    async def _status(self) -> dict[str, Any]:
        """The version of the policy view, and the version that each replica serves."""
        try:
            return await self._holder.status()
        except HolderLost as error:
            raise Unavailable(f"the holder of the policy view: {error}", retry_after=5) from error

    async def _share(self, state: State) -> None:
        """Make a state current on all replicas, this one included, or on none. Raises Conflict, Unavailable."""
        try:
            refusal = await self._holder.change(self._report.version, state.to_dict())
        except HolderLost as error:
            message = f"the holder of the policy view: {error}; GET /v1/routing shows whether the change was made"
            raise Unavailable(message, retry_after=5) from error
        if refusal is not None:
            raise Conflict(f"nothing has changed: {refusal}")

    async def _join(self) -> None:
        offered = View(self._report.version, self._services.store.state.to_dict())
        while True:
            try:
                view = await self._holder.join(self._name, offered)
                break
            except HolderLost as error:
                logger.warning("the holder of the policy view: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
        await self._install(view)

    async def _follow(self) -> None:
        while True:
            try:
                order = await self._holder.exchange(self._name, self._report)
                if order is not None:
                    await self._obey(order)
            except HolderLost as error:
                logger.warning("the holder of the policy view: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception as error:  # Serve then replaces this replica, if the next attempt fails, too
                self._behind = error
                logger.exception("the policy view cannot be installed")
                await asyncio.sleep(RETRY_SECONDS)

    async def _obey(self, order: Order) -> None:
        if order.action == "join":
            await self._join()
            return
        assert order.view is not None
        if order.action == "install":
            await self._install(order.view)
            return
        refusal = ""
        try:
            await self._changes.prepare(self._services.store.read(order.view.state))
        except Exception as error:
            refusal = str(error) if isinstance(error, ValueError) else to_service_error(error).message
        self._report = Report(self._report.version, order.number, refusal)

    async def _install(self, view: View) -> None:
        await self._changes.install(self._services.store.read(view.state))
        self._report, self._behind = Report(view.version), None

    def _started(self, error: BaseException | None) -> None:
        if self._ready.done():  # the engine died later; `check` finds out
            return
        if error is None:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(error)


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
