"""Policies as operators send them: JSON that may have the fields that GET adds, and a description of one line."""

import unicodedata
from collections.abc import Mapping

from ladimo.policy import RoutingPolicy
from server.policies.targets import AUTO

MAX_DESCRIPTION = 1000  # characters
CONTROLS = {"Cc", "Zl", "Zp"}  # Unicode categories: control characters and line separators
# Fields that GET adds to a policy's content. A PUT may contain them, so clients can send back what they have read.
READ_ONLY = frozenset({"version", "source", "accuracy", "figures"})


def read_policy(name: str, raw: Mapping[str, object]) -> RoutingPolicy:
    """The policy that is to be stored under `name`. Raises ValueError, with the first wrong field at the message's start."""
    given = {key: value for key, value in raw.items() if key not in READ_ONLY and value is not None}
    policy = RoutingPolicy.from_dict({"name": name, **given})
    if policy.name != name:
        raise ValueError(f"name: is {policy.name!r}, the path says {name!r}")
    if name == AUTO:
        raise ValueError(f"name: {AUTO!r} means automatic control and cannot name a policy")
    if len(policy.description) > MAX_DESCRIPTION:
        raise ValueError(f"description: has {len(policy.description)} characters, at most {MAX_DESCRIPTION} are allowed")
    if any(unicodedata.category(character) in CONTROLS for character in policy.description):
        raise ValueError("description: must not have control characters or line breaks")
    return policy


def wrong_field(error: ValueError) -> str:
    """The field at the start of the message."""
    return str(error).partition(": ")[0]
