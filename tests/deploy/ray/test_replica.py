"""Two whole servers over the fake engine, with one view of the policies. No Ray: the holder of the view is in this process."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from deploy.ray.calls import Call
from deploy.ray.replica import HolderLost, Replica
from deploy.ray.view import Order, PolicyView, Report, View
from server.engine.core import EngineCore
from server.policies.targets import Automatic, Objective
from tests.server.fakes import fake_policy
from tests.server.serving import Parts, make_server

ADMIN = [(b"authorization", b"Bearer admin-key"), (b"content-type", b"application/json")]


class LocalHolder:
    """The holder as one replica reaches it. `lost`: it cannot."""

    def __init__(self, view: PolicyView) -> None:
        self.view = view
        self.lost = False
        self.joined: list[View] = []

    async def join(self, replica: str, offered: View) -> View:
        self.joined.append(await self._reach().join(replica, offered, self._is_alive))
        return self.joined[-1]

    async def leave(self, replica: str) -> None:
        await self._reach().leave(replica)

    async def exchange(self, replica: str, report: Report) -> Order | None:
        return await self._reach().exchange(replica, report, poll_seconds=0.2)

    async def change(self, base: int, state: dict[str, object]) -> str | None:
        return await self._reach().change(base, state)

    async def status(self) -> dict[str, Any]:
        return await self._reach().status()

    def _reach(self) -> PolicyView:
        if self.lost:
            raise HolderLost("it is lost")
        return self.view

    async def _is_alive(self) -> bool:
        return not self.lost


@dataclass
class Running:
    replica: Replica
    holder: LocalHolder

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[Message, Any]:
        """The start of the answer, with headers by name, and its JSON."""
        call = Call(method, path, headers=ADMIN, body=b"" if body is None else json.dumps(body).encode())
        begin, *parts = [message async for some in self.replica.http(call) for message in some]
        names = {name.decode().lower(): value.decode() for name, value in begin["headers"]}
        return {**begin, "headers": names}, json.loads(b"".join(part["body"] for part in parts))

    async def served(self) -> tuple[str, str]:
        """The policy of a completion, and the version of the view in its headers."""
        begin, answer = await self.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 2})
        assert begin["status"] == 200 and answer["choices"][0]["text"] == "bc"
        return answer["routing"]["policy"], begin["headers"]["x-routing-view"]


Start = Callable[..., Any]


@asynccontextmanager
async def cluster(tmp_path: Path, view: PolicyView) -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:

        async def start(name: str, parts: Parts | None = None, **core: Any) -> Running:
            made = await stack.enter_async_context(make_server(tmp_path / name, parts or Parts(), **core))
            holder = LocalHolder(view)
            replica = Replica(name, made[1], (parts or Parts()).access, holder)
            await replica.start()
            stack.push_async_callback(replica.stop)
            return Running(replica, holder)

        yield start


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_an_admin_request_at_one_replica_changes_all(tmp_path: Path) -> None:
    async with cluster(tmp_path, PolicyView()) as start:
        a, b = await start("a"), await start("b")
        assert await a.served() == await b.served() == ("full", "1")
        policy = fake_policy("mine", 1).to_dict()
        for number, (at, request) in enumerate(
            [
                (a, ("PUT", "/admin/routing/policies/mine", policy)),
                (b, ("PUT", "/admin/routing/default", {"policy": "mine"})),
                (a, ("PUT", "/admin/routing/canary", {"policy": "fast", "share": 1.0})),
            ],
            start=2,
        ):
            begin, _ = await at.ask(*request)
            assert begin["status"] == 200 and begin["headers"]["x-replica"] == ("b" if at is b else "a")
            assert begin["headers"]["x-routing-view"] == str(number)
            assert (await a.ask("GET", "/v1/routing"))[1] == (await b.ask("GET", "/v1/routing"))[1]
            replicas = [{"replica": name, "version": number} for name in "ab"]
            assert (await b.ask("GET", "/v1/replicas"))[1] == {"version": number, "replicas": replicas}
        assert await a.served() == await b.served() == ("fast", "4")
        assert (await b.ask("POST", "/admin/routing/canary/promote"))[0]["status"] == 200
        assert (await a.ask("POST", "/admin/routing/rollback"))[0]["status"] == 200
        assert await a.served() == await b.served() == ("mine", "6")


async def test_a_replica_that_joins_later_has_the_view_before_it_serves(tmp_path: Path) -> None:
    async with cluster(tmp_path, PolicyView()) as start:
        a = await start("a")
        await a.ask("PUT", "/admin/routing/policies/fast", fake_policy("fast", 3).to_dict())
        await a.ask("PUT", "/admin/routing/default", {"auto": {"itl_ms": 50, "min_accuracy": 0.5}})
        b = await start("b")
        assert (await b.ask("GET", "/v1/routing"))[1]["default"] == (await a.ask("GET", "/v1/routing"))[1]["default"]
        _, policy = await b.ask("GET", "/v1/routing/policies/fast")
        assert policy["layers"][0]["top_k"] == 3 and policy["source"] == "stored"


async def test_what_one_replica_cannot_serve_changes_none(tmp_path: Path) -> None:
    """Here one has no free row for the policy. The admin learns it, and the next change is made."""
    async with cluster(tmp_path, PolicyView()) as start:
        a, b = await start("a"), await start("b", max_policies=1)
        begin, answer = await a.ask("PUT", "/admin/routing/default", {"policy": "fast"})
        assert begin["status"] == 409
        assert answer["error"]["message"].startswith(
            "nothing has changed: replica b: requests under other policies hold every row"
        )
        assert await a.served() == await b.served() == ("full", "1")
        assert (await a.ask("PUT", "/admin/routing/policies/mine", fake_policy("mine", 1).to_dict()))[0]["status"] == 200
        assert "mine" in [policy["name"] for policy in (await b.ask("GET", "/v1/routing"))[1]["policies"]]


async def test_what_is_wrong_in_itself_is_refused_as_by_one_server(tmp_path: Path) -> None:
    async with cluster(tmp_path, PolicyView()) as start:
        a = await start("a")
        begin, answer = await a.ask("PUT", "/admin/routing/default", {"policy": "unknown"})
        assert (begin["status"], answer["error"]["code"], begin["headers"]["x-routing-view"]) == (404, "unknown_policy", "1")


async def test_without_the_holder_requests_are_served_and_changes_refused(tmp_path: Path) -> None:
    async with cluster(tmp_path, PolicyView()) as start:
        a = await start("a")
        a.holder.lost = True
        assert await a.served() == ("full", "1")
        begin, answer = await a.ask("PUT", "/admin/routing/default", {"policy": "fast"})
        assert begin["status"] == 503 and "GET /v1/routing shows" in answer["error"]["message"]
        assert (await a.ask("GET", "/v1/replicas"))[0]["status"] == 503
        await a.replica.check()
        a.holder.view, a.holder.lost = PolicyView(), False  # Ray Serve has replaced it
        await until(lambda: _is(a, "PUT", "/admin/routing/default", {"policy": "fast"}))
        assert await a.served() == ("fast", "2")


async def test_a_replica_that_cannot_serve_the_view_does_not_start(tmp_path: Path) -> None:
    view = PolicyView()

    async def alive() -> bool:
        return True

    await view.join("other", View(1, {"policies": {}, "default": {"policy": "gone"}, "history": []}), alive)
    async with cluster(tmp_path, view) as start:
        with pytest.raises(ValueError, match="does not fit this model .*'gone'"):
            await start("a")


async def test_the_engine_s_failures_reach_ray_serve(tmp_path: Path) -> None:
    def fail(core: EngineCore) -> EngineCore:
        raise ValueError("no such device")

    async with cluster(tmp_path, PolicyView()) as start:
        with pytest.raises(ValueError, match="no such device"):
            await start("a", Parts(build=fail))
        b = await start("b", Parts(stall_timeout=-1.0))  # every age of the last turn is too old
        with pytest.raises(RuntimeError, match="dead or stalled"):
            await b.replica.check()


async def test_the_pressure_is_that_of_automatic_control(tmp_path: Path) -> None:
    async with cluster(tmp_path, PolicyView()) as start:
        a = await start("a")
        assert a.replica.pressure() == 0
        await a.ask("PUT", "/admin/routing/default", {"auto": {"itl_ms": 1e-9}})
        for _ in range(3):
            await a.served()
        await until(lambda: _rises(a.replica))


async def test_the_metrics_page_comes_with_the_replica_s_name(tmp_path: Path) -> None:
    async with cluster(tmp_path, PolicyView()) as start:
        name, page = await (await start("a", Parts(default=Automatic(Objective(itl_ms=1e6))))).replica.metrics()
    assert name == "a" and "ladimo_requests_running 0.0\n" in page


async def _is(running: Running, *request: Any) -> bool:
    return bool((await running.ask(*request))[0]["status"] == 200)


async def _rises(replica: Replica) -> bool:
    return replica.pressure() > 1
