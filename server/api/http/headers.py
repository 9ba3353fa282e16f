"""Request headers with a single value."""

import math
import re

from starlette.requests import Request

from server.errors import BadRequest

# Numbers as in JSON. `float` would also take 0_1, +1, .5, digits of other scripts, inf and nan.
_number = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?").fullmatch


def single_header(request: Request, name: str) -> str | None:
    """The header's value without white space around it; None if it was not sent.

    Raises BadRequest for an empty header, and for one that was sent twice, because another reader might take the other value.
    """
    values = [value.strip(" \t") for value in request.headers.getlist(name)]
    if len(values) > 1:
        raise BadRequest(f"{name}: must be sent only once", param=name)
    if values == [""]:
        raise BadRequest(f"{name}: must not be empty", param=name)
    return values[0] if values else None


def number_header(request: Request, name: str) -> float | None:
    """The header's value as a number; NaN if it is no number, None if it was not sent. Raises the errors of `single_header`."""
    text = single_header(request, name)
    if text is None:
        return None
    return float(text) if _number(text) else math.nan
