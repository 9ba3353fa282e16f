"""Translates exceptions into the server's errors, and errors into HTTP answers."""

import json
from collections.abc import Sequence

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.engine.messages import EngineDead, PolicyTableFull
from server.errors import (
    BadRequest,
    Dead,
    InternalError,
    MethodNotAllowed,
    NotFound,
    ServiceError,
    TableFull,
    UnsupportedParameter,
)


def to_service_error(error: Exception) -> ServiceError:
    """The error that a client gets for an exception. For an unforeseen one, the client gets no details."""
    match error:
        case ServiceError():
            return error
        case RequestValidationError():
            return _from_validation(error)
        case HTTPException():
            return _from_http(error)
        case EngineDead():
            return Dead("the engine has stopped; nothing can be computed any more", retry_after=30)
        case PolicyTableFull():
            return TableFull(
                "requests under other policies hold every row of the policy table; try again when some have finished"
            )
        case _:
            return InternalError("internal error; the server's log has the details under this request's id")


def error_response(error: ServiceError) -> Response:
    # JSON in ASCII, because a message may quote text that has no UTF-8 form.
    body = json.dumps(error.to_dict()).encode()
    return Response(body, error.status, error.headers, media_type="application/json")


def json_path(location: Sequence[int | str]) -> str:
    """For example, ("messages", 0, "content") -> "messages[0].content". Tags of unions, "<like this>", are left out."""
    path = ""
    for part in location:
        if isinstance(part, str) and part.startswith("<"):
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _from_validation(error: RequestValidationError) -> ServiceError:
    first = error.errors()[0]
    where, location = first["loc"][0], first["loc"][1:]
    if first["type"] == "json_invalid":
        return BadRequest(f"the body is not valid JSON: {first['ctx']['error']} at character {location[0]}")
    if not location:  # an error of the whole body: fields that exclude each other, or a body that is no object
        return BadRequest(first["msg"] if isinstance(first["input"], dict) else "the body must be a JSON object")
    param = json_path(location)
    message = f"{param}: {first['msg']}" if where == "body" else f"{where} {param}: {first['msg']}"
    if first["type"] == "extra_forbidden":  # an unknown field in an object where no field may be ignored
        return UnsupportedParameter(f"{param}: not supported by this server; leave it out", param=param)
    kind = UnsupportedParameter if first["type"] == UnsupportedParameter.code else BadRequest
    return kind(message, param=param)


def _from_http(error: HTTPException) -> ServiceError:
    match error.status_code:
        case 404:
            return NotFound("there is no such route")
        case 405:
            refusal = MethodNotAllowed("this route does not take this method")
            allowed = (error.headers or {}).get("Allow", "")
            refusal.headers = {"Allow": allowed.replace("GET", "GET, HEAD")}
            return refusal
        case status if status < 500:
            return BadRequest(error.detail)
        case _:
            return InternalError(error.detail)
