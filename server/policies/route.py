"""The routing of one request, as the policy store finds it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ladimo.policy import RoutingPolicy


@dataclass(frozen=True, slots=True)
class Choice:
    """What a request asked for itself: a policy version, its accuracy, and where the request said so."""

    policy: RoutingPolicy
    accuracy: float
    reason: str


@dataclass(frozen=True, slots=True)
class Route:
    """The routing of one request: its policy version, its accuracy, and the reason for the choice.

    `accuracy` is None if the policy has no measured point on the frontier. `reason` names what decided: "body", "header",
    "model", "tier", "canary", "auto", "queue", "deadline" or "default".
    `floor`: the lowest accuracy to which it may be lowered; None if it may not.
    `follows`: while the request waits, it takes each new accuracy of automatic control, within what it allows. `own`: the most
    that it takes then; None if it left the choice to the server.
    `phases`: all phases, if the request asked for phases. Each has a route of its own, and all fields but `requested` are those
    of the first.
    """

    policy: RoutingPolicy
    accuracy: float | None
    reason: str
    requested: str  # what the request asked for: a policy name, "accuracy", "phases", "auto" or "default"
    floor: float | None = None
    follows: bool = False
    own: Choice | None = None
    phases: "tuple[RoutePhase, ...]" = ()

    @property
    def parts(self) -> "tuple[Route, ...]":
        """The routes of the request's phases, in order. Without phases, the route itself."""
        return tuple(phase.route for phase in self.phases) or (self,)

    @property
    def policies(self) -> tuple[RoutingPolicy, ...]:
        """The policies of its parts."""
        return tuple(part.policy for part in self.parts)

    @property
    def most_policies(self) -> int:
        """How many different policies its parts can have at once, whatever automatic control does."""
        return len({(part.floor, part.own) if part.follows else part.policy.version for part in self.parts})

    def map(self, change: "Callable[[Route], Route]") -> "Route":
        """The route with each of its parts changed."""
        if not self.phases:
            return change(self)
        return in_phases([RoutePhase(change(phase.route), phase.until) for phase in self.phases])


@dataclass(frozen=True, slots=True)
class RoutePhase:
    """One phase of a request: its route, and what ends it (see `PhaseTarget`)."""

    route: Route
    until: str | None


def in_phases(phases: Sequence[RoutePhase]) -> Route:
    """The route of a request that asked for these phases."""
    return replace(phases[0].route, requested="phases", phases=tuple(phases))


@dataclass(slots=True)
class Binding:
    """The route of one request. It may change until the request begins to run; all who tell of it read it here."""

    route: Route
