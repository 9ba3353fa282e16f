"""Request headers that hold one value."""

import math
import re

from starlette.requests import Request

from server.errors import BadRequest

# JSON's numbers: Python's own reader also takes 0_1, +1, .5, digits of other scripts, inf and nan.
_number = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?").fullmatch


def single_header(request: Request, name: str) -> str | None:
    """The header's value without white space around it; None when it was not sent. Raises BadRequest for one that is empty, or
    that was sent twice: another reader might take the other one."""
    values = [value.strip(" \t") for value in request.headers.getlist(name)]
    if len(values) > 1:
        raise BadRequest(f"{name}: must be sent only once", param=name)
    if values == [""]:
        raise BadRequest(f"{name}: must not be empty", param=name)
    return values[0] if values else None


def number_header(request: Request, name: str) -> float | None:
    """The header's value as a number, NaN for anything else; None when it was not sent. Raises what `single_header` raises."""
    text = single_header(request, name)
    if text is None:
        return None
    return float(text) if _number(text) else math.nan
