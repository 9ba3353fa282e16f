"""Service tiers: what a request's `service_tier` means for its policy and for its place among those that wait.

`auto` and `default` are always there and mean the server's default. The others are the operator's map, or `default_tiers`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.policies.targets import AUTO, Ask, AtAccuracy, Automatic, Named, parse_default

DEFAULT = "default"
FLEX_PRIORITY, PRIORITY_PRIORITY = 10, -10
MAX_PRIORITY = 2**31
NAME = re.compile(r"[a-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tier:
    """What a tier gives to requests that do not choose themselves. `target` None: the server's default. `priority`: lower runs
    earlier. `controlled`: automatic control may move the request's accuracy."""

    target: Named | AtAccuracy | None = None
    priority: int = 0
    controlled: bool = False

    @property
    def ask(self) -> Ask | None:
        """What the tier asks of the router for a request that does not choose itself."""
        return None if self.target is None else Ask(self.target, "tier", "service_tier")

    def to_dict(self) -> dict[str, Any]:
        return {"target": None if self.target is None else self.target.to_dict(), "priority": self.priority}


FIXED = {AUTO: Tier(controlled=True), DEFAULT: Tier()}


def default_tiers(has_fast: bool, has_frontier: bool) -> dict[str, Tier]:
    """`flex` is cheap and waits, `priority` is whole and goes first. `has_fast`: there is a policy of this name."""
    cheapest = Named("fast") if has_fast else AtAccuracy(0.0) if has_frontier else None
    return {"flex": Tier(cheapest, FLEX_PRIORITY), "priority": Tier(Named("full"), PRIORITY_PRIORITY)}


def parse_tiers(raw: object) -> dict[str, Tier]:
    """An operator's map: by tier {"policy": NAME} or {"accuracy": X} or neither, and a "priority". Raises ValueError."""
    if not isinstance(raw, Mapping):
        raise ValueError('must be a map such as {"flex": {"policy": "fast", "priority": 10}}')
    return {name: _tier(name, value) for name, value in raw.items()}


def _tier(name: object, raw: object) -> Tier:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a tier: lower-case letters, digits, - and _ only, 64 at most")
    if name in FIXED:
        raise ValueError(f"{name}: always means the server's default and cannot be mapped")
    if not isinstance(raw, Mapping):
        raise ValueError(f'{name}: must be a map such as {{"policy": "fast", "priority": 10}}')
    choice = {key: value for key, value in raw.items() if key != "priority"}
    unknown = sorted(str(key) for key in choice.keys() - {"policy", "accuracy"})
    if unknown:
        raise ValueError(f"{name}.{unknown[0]}: unknown field")
    if len(choice) > 1:
        raise ValueError(f"{name}: name either a policy or an accuracy")
    priority = raw.get("priority", 0)
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > MAX_PRIORITY:
        raise ValueError(f"{name}.priority: must be a whole number")
    try:
        target = parse_default(choice) if choice else None
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error
    assert not isinstance(target, Automatic)
    return Tier(target, priority)
