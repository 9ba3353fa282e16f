"""The deadline of a request: the server's limit, or a shorter one from the client's header."""

import asyncio
import math

from fastapi import Request

from server.api.http.headers import number_header
from server.errors import BadRequest

TIMEOUT_HEADER = "X-Request-Timeout"


def request_deadline(request: Request, limit_seconds: float | None) -> float | None:
    """The deadline in the event loop's time; None if there is none. Raises BadRequest."""
    seconds = math.inf if limit_seconds is None else limit_seconds
    asked = number_header(request, TIMEOUT_HEADER)
    if asked is not None:
        if not (math.isfinite(asked) and asked > 0):
            raise BadRequest(f"{TIMEOUT_HEADER}: must be a positive number of seconds", param=TIMEOUT_HEADER)
        seconds = min(seconds, asked)
    return None if math.isinf(seconds) else asyncio.get_running_loop().time() + seconds
