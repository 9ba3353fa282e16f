"""How long a request may take: the server's limit, or a shorter one that the client names in a header."""

import asyncio
import math

from fastapi import Request

from server.errors import BadRequest

TIMEOUT_HEADER = "X-Request-Timeout"


def request_deadline(request: Request, limit_seconds: float | None) -> float | None:
    """The event loop's time at which the answer is too late; None for never. Raises BadRequest."""
    seconds = math.inf if limit_seconds is None else limit_seconds
    asked = request.headers.get(TIMEOUT_HEADER)
    if asked is not None:
        try:
            value = float(asked)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise BadRequest(f"{TIMEOUT_HEADER}: must be a positive number of seconds", param=TIMEOUT_HEADER)
        seconds = min(seconds, value)
    return None if math.isinf(seconds) else asyncio.get_running_loop().time() + seconds
