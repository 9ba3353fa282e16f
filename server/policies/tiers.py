"""Service tiers: a request's `service_tier` chooses its policy and its priority in the queue.

The tiers `auto` and `default` always exist and mean the server's default. The operator defines the others; if not,
`default_tiers` does.
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
    """A service tier. `target` is the policy or accuracy of requests that choose none; None is the server's default.
    `priority`: lower runs earlier. `controlled`: automatic control may change the request's accuracy."""

    target: Named | AtAccuracy | None = None
    priority: int = 0
    controlled: bool = False

    @property
    def ask(self) -> Ask | None:
        """The tier's target as a request's choice; None for the server's default."""
        return None if self.target is None else Ask(self.target, "tier", "service_tier")

    def to_dict(self) -> dict[str, Any]:
        return {"target": None if self.target is None else self.target.to_dict(), "priority": self.priority}


FIXED = {AUTO: Tier(controlled=True), DEFAULT: Tier()}


def default_tiers(has_fast: bool, has_frontier: bool) -> dict[str, Tier]:
    """`flex`: the cheapest policy at low priority. `priority`: policy `full` at high priority.

    `has_fast`: there is a policy `fast`, which `flex` then takes. `has_frontier`: otherwise `flex` takes accuracy 0.
    """
    cheapest = Named("fast") if has_fast else AtAccuracy(0.0) if has_frontier else None
    return {"flex": Tier(cheapest, FLEX_PRIORITY), "priority": Tier(Named("full"), PRIORITY_PRIORITY)}


def parse_tiers(raw: object) -> dict[str, Tier]:
    """Read an operator's tiers. Each has {"policy": NAME} or {"accuracy": X} or neither, and may have a "priority" (default 0).

    Raises ValueError naming the wrong tier and field.
    """
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
