"""What operators have set: policies, the default, its history, the canary. One immutable value."""

from collections.abc import Mapping
from dataclasses import dataclass

from ladimo.policy import RoutingPolicy
from server.policies.canary import Canary
from server.policies.targets import Target


@dataclass(frozen=True, slots=True)
class PastDefault:
    """An earlier default. If it names a policy, `policy` is the version that had this name."""

    target: Target
    policy: RoutingPolicy | None


@dataclass(frozen=True, slots=True)
class State:
    """`stored`: policies that admins have put. They hide checkpoint policies of the same name. `history`: oldest first.
    `canary`: None if there is none."""

    stored: Mapping[str, RoutingPolicy]
    default: Target
    history: tuple[PastDefault, ...] = ()
    canary: Canary | None = None

    def to_dict(self) -> dict[str, object]:
        """The state as JSON. The policy store reads it back."""
        return {
            "default": self.default.to_dict(),
            "policies": {name: policy.to_dict() for name, policy in self.stored.items()},
            "history": [
                {"default": past.target.to_dict(), "policy": None if past.policy is None else past.policy.to_dict()}
                for past in self.history
            ],
            "canary": None if self.canary is None else self.canary.to_dict(),
        }
