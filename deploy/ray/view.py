"""The view of the policies that all replicas share. A change reaches all of them or none.

A view is a version and what operators have set (`server.policies.state.State` as JSON). A change has two phases. First, every
replica prepares the proposed view: it checks it and makes its policies ready in the engine. Only if all of them can do so, the
proposal becomes the current view, and every replica installs it.

Replicas call `exchange` again and again. Each call tells what the replica has, and the answer says what it must do next. What
it must do follows from what it has. So a lost message, a restarted replica or a restarted holder of the view needs no special
case.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

POLL_SECONDS = 5.0  # the longest time that `exchange` waits
PREPARE_SECONDS = 30.0  # an engine that computes a long step answers after it
INSTALL_SECONDS = 10.0
CHECK_SECONDS = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class View:
    """`version` grows by one with each change. `state`: as `State.to_dict` writes it."""

    version: int
    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica has. `version`: of the view that it serves. `proposal`: the number of the last proposal that it has looked
    at and not yet dropped; `refusal`: why it cannot serve this one, empty if it can."""

    version: int
    proposal: int | None = None
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Order:
    """What a replica must do. "join": join again, because the holder does not know it. "prepare": look at the proposal of this
    number. "install": serve this view, and drop any proposal."""

    action: Literal["join", "prepare", "install"]
    view: View | None = None
    number: int | None = None


@dataclass(slots=True)
class _Member:
    replica: str
    report: Report
    is_alive: Callable[[], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class _Proposal:
    number: int
    view: View


class PolicyView:
    """The holder of the view. All calls must come from one event loop.

    `prepare_seconds`, `install_seconds`: how long a change waits for the replicas in its two phases. `check_seconds`: how often
    it finds out meanwhile whether silent ones live.
    """

    def __init__(
        self,
        prepare_seconds: float = PREPARE_SECONDS,
        install_seconds: float = INSTALL_SECONDS,
        check_seconds: float = CHECK_SECONDS,
    ) -> None:
        self._prepare_seconds, self._install_seconds, self._check_seconds = prepare_seconds, install_seconds, check_seconds
        self._current: View | None = None
        self._proposal: _Proposal | None = None
        self._proposals = 0
        self._members: dict[str, _Member] = {}
        self._lock = asyncio.Lock()
        self._news = asyncio.Condition()

    async def join(self, replica: str, offered: View, is_alive: Callable[[], Awaitable[bool]]) -> View:
        """Become one of the replicas. Returns the view that the replica must install before it serves requests.

        `offered`: what the replica has. It becomes the current view if the holder has none, or an older one because it was
        restarted. Waits while a change is under way.
        """
        async with self._lock:
            if self._current is None or offered.version > self._current.version:
                self._current = replace(offered, version=max(offered.version, 1))
            self._members[replica] = _Member(replica, Report(version=0), is_alive)
            await self._tell()
            return self._current

    async def leave(self, replica: str) -> None:
        """Stop being one of the replicas."""
        self._members.pop(replica, None)
        await self._tell()

    async def exchange(self, replica: str, report: Report, poll_seconds: float = POLL_SECONDS) -> Order | None:
        """Take a replica's report. Returns its next order, or None if there was none for a while."""
        member = self._members.get(replica)
        if member is None:
            return Order("join")
        member.report = report
        await self._tell()
        try:
            async with asyncio.timeout(poll_seconds), self._news:
                await self._news.wait_for(lambda: self._order(replica) is not None)
        except TimeoutError:
            return None
        return self._order(replica)

    async def change(self, base: int, state: Mapping[str, Any]) -> str | None:
        """Make `state` the next view, if `base` is the version of the current one and every replica can serve it.

        Returns None when every replica that lives has installed the view. Otherwise nothing has changed, and it returns why.
        """
        async with self._lock:
            if self._current is None or base != self._current.version:
                return "another change came first; look at the policies and try again"
            self._proposals += 1
            proposal = self._proposal = _Proposal(self._proposals, View(base + 1, state))
            try:
                silent = await self._until(lambda report: report.proposal == proposal.number, self._prepare_seconds)
                if not self._members:
                    return "no replica is ready"
                if silent:
                    return f"replica {silent[0]} did not answer within {self._prepare_seconds:g} s"
                for member in self._members.values():
                    if member.report.refusal:
                        return f"replica {member.replica}: {member.report.refusal}"
                self._current = proposal.view
            finally:
                self._proposal = None
                await self._tell()
            for replica in await self._until(lambda report: report.version == base + 1, self._install_seconds):
                logger.warning("replica %s has not yet installed version %d of the policy view", replica, base + 1)
            return None

    async def status(self) -> dict[str, Any]:
        """The version of the view, and of each replica that lives."""
        await self._drop_dead(list(self._members.values()))
        return {
            "version": 0 if self._current is None else self._current.version,
            "replicas": [{"replica": name, "version": member.report.version} for name, member in sorted(self._members.items())],
        }

    def _order(self, replica: str) -> Order | None:
        member, current, proposal = self._members.get(replica), self._current, self._proposal
        if member is None:
            return Order("join")
        assert current is not None
        if proposal is not None:
            answered = member.report.proposal == proposal.number
            return None if answered else Order("prepare", proposal.view, proposal.number)
        if member.report.version != current.version or member.report.proposal is not None:
            return Order("install", current)
        return None

    async def _until(self, done: Callable[[Report], bool], seconds: float) -> list[str]:
        """Wait until all members are done. Members that have died are dropped. Returns those that live and are not done."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds

        def missing() -> list[_Member]:
            return [member for member in self._members.values() if not done(member.report)]

        await self._tell()
        while missing() and loop.time() < end:
            try:
                async with asyncio.timeout(min(self._check_seconds, seconds)), self._news:
                    await self._news.wait_for(lambda: not missing())
            except TimeoutError:
                await self._drop_dead(missing())
        return [member.replica for member in missing()]

    async def _drop_dead(self, members: list[_Member]) -> None:
        alive = await asyncio.gather(*(member.is_alive() for member in members))
        for member, lives in zip(members, alive, strict=True):
            if not lives and self._members.get(member.replica) is member:
                await self.leave(member.replica)

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()
