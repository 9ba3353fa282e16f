"""Numbers and flags of a configuration file, checked one by one. Every check raises ValueError naming the field.

`raw` is the JSON object that holds the field; a missing or null field takes the default.
"""

import sys
from collections.abc import Mapping
from typing import Any

# Far above any LLaMA: a broken number must not be taken for a model to build.
MAX_SIZE = 2**24


def positive_int(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def positive_number(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def size(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = positive_int(raw, name, default)
    if value > MAX_SIZE:
        raise ValueError(f"{name} must be at most {MAX_SIZE}, got {value}")
    return value


def flag(raw: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value
