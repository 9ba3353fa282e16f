"""The common view: all replicas change or none, whoever dies, refuses, joins or restarts in between."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from deploy.ray.view import PolicyView, Report, View

FIRST = View(0, {"is": "first"})


class Follower:
    """A replica without a server. `refuses`: states that it cannot serve. `deaf`: it does not answer."""

    def __init__(self, name: str, view: PolicyView, refuses: tuple[str, ...] = ()) -> None:
        self.name, self.view, self.refuses = name, view, refuses
        self.alive = True
        self.deaf = False
        self.report = Report(0)
        self.served: list[str] = []

    async def start(self, offered: View = FIRST) -> None:
        self._install(await self.view.join(self.name, offered, self._is_alive))

    async def run(self) -> None:
        while self.alive:
            order = await self.view.exchange(self.name, self.report, poll_seconds=0.5)
            if self.deaf or not self.alive or order is None:
                await asyncio.sleep(0.01)
            elif order.action == "join":
                await self.start(View(self.report.version, {"is": self.served[-1]}))
            elif order.action == "install":
                assert order.view is not None
                self._install(order.view)
            else:
                assert order.view is not None
                refusal = "no room" if order.view.state["is"] in self.refuses else ""
                self.report = Report(self.report.version, order.number, refusal)

    def _install(self, view: View) -> None:
        self.report = Report(view.version)
        self.served.append(view.state["is"])

    async def _is_alive(self) -> bool:
        return self.alive


@asynccontextmanager
async def running(*followers: Follower) -> AsyncIterator[None]:
    for follower in followers:
        await follower.start()
    tasks = [asyncio.create_task(follower.run()) for follower in followers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def versions(view: PolicyView) -> list[tuple[str, int]]:
    return [(one["replica"], one["version"]) for one in (await view.status())["replicas"]]


async def test_a_change_has_reached_all_when_it_returns() -> None:
    view = PolicyView()
    a, b = Follower("a", view), Follower("b", view)
    async with running(a, b):
        assert await view.change(1, {"is": "second"}) is None
        assert a.served == b.served == ["first", "second"]
        assert await view.status() == {
            "version": 2,
            "replicas": [{"replica": "a", "version": 2}, {"replica": "b", "version": 2}],
        }


async def test_one_refusal_leaves_all_as_they_were_and_the_next_change_is_made() -> None:
    view = PolicyView()
    a, b = Follower("a", view), Follower("b", view, refuses=("second",))
    async with running(a, b):
        assert await view.change(1, {"is": "second"}) == "replica b: no room"
        await until(lambda: a.report.proposal is None and b.report.proposal is None)  # what was prepared is dropped
        assert {*a.served, *b.served} == {"first"} and await versions(view) == [("a", 1), ("b", 1)]
        assert await view.change(1, {"is": "third"}) is None
        assert a.served[-1] == b.served[-1] == "third"


async def test_a_change_on_an_old_view_is_refused() -> None:
    """Two admins at two replicas: the second one has not seen what the first one did."""
    view = PolicyView()
    a = Follower("a", view)
    async with running(a):
        results = await asyncio.gather(view.change(1, {"is": "second"}), view.change(1, {"is": "third"}))
        assert list(results) == [None, "another change came first; look at the policies and try again"]
        assert a.served == ["first", "second"]


async def test_a_dead_replica_does_not_hold_up_a_change_and_a_silent_one_refuses_it() -> None:
    view = PolicyView(prepare_seconds=0.5, install_seconds=0.1, check_seconds=0.1)
    a, b = Follower("a", view), Follower("b", view)
    async with running(a, b):
        b.deaf = True
        assert await view.change(1, {"is": "second"}) == "replica b did not answer within 0.5 s"
        assert a.served[-1] == "first"
        b.alive = False
        assert await view.change(1, {"is": "third"}) is None
        assert await versions(view) == [("a", 2)]


async def test_a_replica_that_joins_during_a_change_gets_the_new_view_first() -> None:
    view = PolicyView()
    a, late = Follower("a", view), Follower("late", view)
    a.deaf = True
    async with running(a):
        change = asyncio.create_task(view.change(1, {"is": "second"}))
        await until(lambda: view._proposal is not None)
        joining = asyncio.create_task(late.start())
        await asyncio.sleep(0.05)
        assert not joining.done()
        a.deaf = False
        assert await change is None
        await joining
        assert late.served == ["second"]


async def test_a_restarted_holder_gets_the_newest_view_back_from_the_replicas() -> None:
    """The replicas differ if the holder died in the middle of a change that was already decided."""
    old, new = PolicyView(), PolicyView()
    a, b = Follower("a", old), Follower("b", old)
    async with running(a, b):
        assert await old.change(1, {"is": "second"}) is None
        b._install(View(3, {"is": "third"}))
        a.view = b.view = new
        await until(lambda: a.served[-1] == "third")
        assert a.report.version == b.report.version == 3
        assert await new.change(3, {"is": "fourth"}) is None
        assert a.served[-1] == b.served[-1] == "fourth"


async def test_without_replicas_nothing_changes() -> None:
    view = PolicyView()
    assert await view.change(0, {"is": "second"}) is not None
    a = Follower("a", view)
    await a.start()
    await view.leave("a")
    assert await view.change(1, {"is": "second"}) == "no replica is ready"


@pytest.mark.parametrize("alive", [True, False])
async def test_the_status_leaves_out_the_dead(alive: bool) -> None:
    view = PolicyView()
    follower = Follower("a", view)
    async with running(follower):
        await until(lambda: view._members["a"].report.version == 1)
        follower.alive = alive
        assert await versions(view) == ([("a", 1)] if alive else [])
