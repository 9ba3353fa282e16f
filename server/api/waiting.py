"""Requests that wait: while nothing of them has begun to run, they take each new accuracy of automatic control.

So a decrease helps at once, also those that came before it. The engine knows what has begun, so it makes the change or refuses
it, and its reply decides. A request whose change is refused is asked for again at the next decision, as long as it waits.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from server.engine.messages import Rebinding, Rebound
from server.policies.route import Route
from server.policies.store import PolicyStore


class Waiting(Protocol):
    """A request without a first token. `request_ids`: of its sequences."""

    @property
    def route(self) -> Route: ...

    @property
    def request_ids(self) -> tuple[str, ...]: ...

    def rebind(self, route: Route) -> None:
        """From now on this is its route."""


class WaitingRequests:
    """`send`: gives changes to the engine, which replies to `rebound`."""

    def __init__(self, store: PolicyStore, send: Callable[[Sequence[Rebinding]], None]) -> None:
        self._store, self._send = store, send
        self._waiting: dict[Waiting, None] = {}  # in order of arrival
        self._asked: list[tuple[Waiting, Route]] = []  # what the engine has not replied to yet

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Waiting) -> None:
        """A request goes to the engine. Requests that do not follow automatic control are left alone."""
        if any(part.follows for part in request.route.parts):
            self._waiting[request] = None

    def remove(self, request: Waiting) -> None:
        """The request has a first token, or has ended. A second call does nothing."""
        self._waiting.pop(request, None)

    def follow(self) -> None:
        """Ask the engine to give all of them the accuracy of now. Nothing happens while a reply is due or control is off."""
        if self._asked or self._store.objective is None:
            return
        routes = ((request, self._store.followed(request.route)) for request in self._waiting)
        self._asked = [(request, route) for request, route in routes if route != request.route]
        if self._asked:
            self._send([Rebinding(request.request_ids, route.policies) for request, route in self._asked])

    def rebound(self, reply: Rebound) -> None:
        """Take the engine's reply."""
        asked, self._asked = self._asked, []
        for (request, route), changed in zip(asked, reply.changed, strict=True):
            if changed and request in self._waiting:  # else its client has left, and the engine is about to drop it
                request.rebind(route)
