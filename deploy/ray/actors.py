"""The parts of the deployment as Ray runs them, each in its own process. What they do is in `view`, `replica` and `gateway`."""

import asyncio
import gc
import sys
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp, Message

from deploy.ray.autoscaling import PRESSURE
from deploy.ray.calls import Call
from deploy.ray.config import DeploymentConfig
from deploy.ray.gateway import Gateway, ReplicaLost, make_app
from deploy.ray.replica import HolderLost, Replica
from deploy.ray.view import Order, PolicyView, Report, View
from server import logs
from server.launch import SWITCH_SECONDS, access_of, build_services

PING_SECONDS = 1.0
METRICS_SECONDS = 5.0

T = TypeVar("T")


class ViewHolder:
    """`PolicyView` for replicas on other machines. If it dies, Ray Serve replaces it, and the replicas bring the view back."""

    def __init__(self) -> None:
        self._view = PolicyView()

    async def join(self, replica: str, offered: View, actor: Any) -> View:
        """`actor`: the replica's handle."""
        return await self._view.join(replica, offered, lambda: _is_alive(actor))

    async def leave(self, replica: str) -> None:
        await self._view.leave(replica)

    async def exchange(self, replica: str, report: Report) -> Order | None:
        return await self._view.exchange(replica, report)

    async def change(self, base: int, state: dict[str, Any]) -> str | None:
        return await self._view.change(base, state)

    async def status(self) -> dict[str, Any]:
        return await self._view.status()


class ReplicaActor:
    """A replica."""

    async def __init__(self, config: DeploymentConfig, holder: Any) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        settings = config.settings()
        logs.configure(settings.log_level)
        sys.setswitchinterval(SWITCH_SECONDS)
        services = await asyncio.to_thread(build_services, settings)
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(name, services, access_of(settings), RemoteHolder(holder))
        await self._replica.start()
        gc.collect()
        gc.freeze()

    async def http(self, call: Call) -> AsyncGenerator[list[Message], None]:
        async for messages in self._replica.http(call):
            yield messages

    async def metrics(self) -> tuple[str, str]:
        return await self._replica.metrics()

    async def check_health(self) -> None:
        await self._replica.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {PRESSURE: self._replica.pressure()}

    async def __del__(self) -> None:  # Ray Serve calls and awaits it after the last request
        if hasattr(self, "_replica"):
            await self._replica.stop()


class RemoteHolder:
    """The holder of the view, as a replica calls it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._actor = ray.get_runtime_context().current_actor

    async def join(self, replica: str, offered: View) -> View:
        return await _reach(self._handle.join.remote(replica, offered, self._actor))

    async def leave(self, replica: str) -> None:
        await _reach(self._handle.leave.remote(replica))

    async def exchange(self, replica: str, report: Report) -> Order | None:
        return await _reach(self._handle.exchange.remote(replica, report))

    async def change(self, base: int, state: dict[str, object]) -> str | None:
        return await _reach(self._handle.change.remote(base, state))

    async def status(self) -> dict[str, Any]:
        return await _reach(self._handle.status.remote())


def gateway_app(replica: str, max_body_bytes: int) -> ASGIApp:
    """The gateway's application. `replica`: the name of the replicas' deployment in this application."""
    handle = serve.get_deployment_handle(replica, app_name=serve.get_replica_context().app_name)

    async def ask(call: Call) -> AsyncGenerator[list[Message], None]:
        answer = handle.options(stream=True, method_name="http").remote(call)
        over = False
        try:
            async for messages in answer:
                yield messages
            over = True
        except RayActorError as error:
            over = True
            raise ReplicaLost(str(error)) from error
        finally:
            if not over:
                answer.cancel()

    async def read_pages() -> dict[str, str]:
        pages = await handle.broadcast("metrics").results_async(timeout_s=METRICS_SECONDS, return_exceptions=True)
        return dict(page for page in pages if isinstance(page, tuple))  # a replica that has just died has none

    return make_app(Gateway(ask, read_pages, max_body_bytes))


async def _reach(answer: Awaitable[T]) -> T:
    try:
        return await answer
    except (RayActorError, RayServeException) as error:
        raise HolderLost(str(error)) from error


async def _is_alive(actor: Any) -> bool:
    """False only if the actor's process has ended. One that is silent for a while may live."""
    try:
        await asyncio.wait_for(actor.__ray_ready__.remote(), PING_SECONDS)
    except (TimeoutError, ActorUnavailableError):
        return True
    except RayActorError:
        return False
    return True
