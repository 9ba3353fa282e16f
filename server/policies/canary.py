"""A canary: a share of the requests that leave the choice to the server runs under a candidate for the next default."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.policies.sampling import in_share
from server.policies.targets import AtAccuracy, Automatic, Named, is_number, parse_default


@dataclass(frozen=True, slots=True)
class Canary:
    """`target`: the candidate. `share`: of the requests that leave the choice to the server, above 0 and at most 1."""

    target: Named | AtAccuracy
    share: float

    def takes(self, request_id: str) -> bool:
        """Whether it takes the request of this id. See `in_share`."""
        return in_share(request_id, self.share, f"canary {self.target}")

    def to_dict(self) -> dict[str, Any]:
        return {**self.target.to_dict(), "share": self.share}


def parse_canary(raw: object) -> Canary:
    """Read a canary from JSON. Raises ValueError, with the first wrong field at the message's start."""
    if not isinstance(raw, Mapping) or set(raw) not in ({"policy", "share"}, {"accuracy", "share"}):
        raise ValueError('canary: must be {"policy": NAME, "share": X} or {"accuracy": X, "share": X}')
    share = raw["share"]
    if not is_number(share) or not 0 < share <= 1:
        raise ValueError("share: must be a number above 0 and at most 1")
    target = parse_default({key: value for key, value in raw.items() if key != "share"})
    assert not isinstance(target, Automatic)
    return Canary(target, float(share))
