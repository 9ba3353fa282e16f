"""The routing of one request, as the policy store finds it."""

from dataclasses import dataclass

from ladimo.policy import RoutingPolicy


@dataclass(frozen=True, slots=True)
class RoutePhase:
    """One phase of a request: its policy version and accuracy, and what ends it (see `PhaseTarget`)."""

    policy: RoutingPolicy
    accuracy: float | None
    until: str | None


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
    `phases`: all phases, if the request has several. `policy` and `accuracy` are then those of the first.
    """

    policy: RoutingPolicy
    accuracy: float | None
    reason: str
    requested: str  # what the request asked for: a policy name, "accuracy", "phases", "auto" or "default"
    floor: float | None = None
    follows: bool = False
    own: Choice | None = None
    phases: tuple[RoutePhase, ...] = ()

    @property
    def policies(self) -> tuple[RoutingPolicy, ...]:
        """The policies of the request's phases, in order; one without phases."""
        return tuple(phase.policy for phase in self.phases) or (self.policy,)

    @property
    def highest_accuracy(self) -> float | None:
        """The accuracy of its most accurate phase; None if one of them is not on the frontier."""
        accuracies = [phase.accuracy for phase in self.phases] or [self.accuracy]
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        return max(known) if len(known) == len(accuracies) else None


@dataclass(slots=True)
class Binding:
    """The route of one request. It may change until the request begins to run; all who tell of it read it here."""

    route: Route
