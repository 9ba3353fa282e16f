"""Reads numbers and flags from a configuration file and checks them. Each function raises ValueError naming a wrong field.

`raw` is the JSON object with the field `name`. A missing or null field takes the default.
"""

import sys
from collections.abc import Mapping
from typing import Any

# Larger than in any LLaMA. A broken number must not make the loader allocate a huge model.
MAX_SIZE = 2**24


def positive_int(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """An integer from 1 to 2^31 - 1."""
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def positive_number(raw: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number above 0."""
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def size(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """An integer from 1 to MAX_SIZE."""
    value = positive_int(raw, name, default)
    if value > MAX_SIZE:
        raise ValueError(f"{name} must be at most {MAX_SIZE}, got {value}")
    return value


def flag(raw: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or false."""
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value
