"""Values of policy and frontier JSON: which ones are accepted, and how numbers are written."""

import sys
from dataclasses import MISSING
from typing import Any

from ladimo.model.rule import Spec


def checked_number(value: Any, spec: Spec, path: str) -> Any:
    """A number of policy JSON. Raises ValueError beginning with `path` if it is not one that `spec` allows."""
    if value is None and spec.nullable:
        return None
    if value is MISSING or not _fits(value, spec):
        raise ValueError(f"{path}: must be {'null or ' * spec.nullable}{spec}")
    return spec.kind(value)


def _fits(value: Any, spec: Spec) -> bool:
    right_kind = is_number(value) if spec.kind is float else type(value) is spec.kind
    return right_kind and spec.lowest <= value <= spec.highest


def is_number(value: object) -> bool:
    """Whether this is a finite number. True and False are not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # also false for NaN, infinity and integers that are too large for a float


def is_unicode(text: str) -> bool:
    """Whether the text can be written in UTF-8. JSON can contain half of a surrogate pair, but UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def canonical(value: float) -> float:
    """Write equal numbers in the same way: 1 becomes 1.0 and -0.0 becomes 0.0. So equal rules have equal versions."""
    return float(value) + 0.0
