"""Everything that can go wrong for a client, as one tree; the HTTP layer renders it in OpenAI's nesting.

ServiceError                       status  code
├── BadRequest                     400     invalid_request
│   ├── UnsupportedParameter       400     unsupported_parameter
│   ├── ContextLengthExceeded      400     context_length_exceeded
│   ├── InvalidPolicy              400     invalid_policy
│   └── NoFrontier                 400     no_frontier
├── Unauthorized                   401     invalid_api_key
├── Forbidden                      403     admin_forbidden
├── NotFound                       404     not_found
│   ├── UnknownModel               404     model_not_found
│   └── UnknownPolicy              404     unknown_policy
├── MethodNotAllowed               405     method_not_allowed
├── RequestTimeout                 408     request_timeout
├── Conflict                       409     conflict
│   ├── PolicyInUse                409     policy_in_use
│   ├── NoPreviousDefault          409     no_previous_default
│   └── TableFull                  409     policy_table_full
├── PreconditionFailed             412     precondition_failed
├── BodyTooLarge                   413     body_too_large
├── UnsupportedMediaType           415     unsupported_media_type
├── QueueFull                      429     queue_full
├── HeadersTooLarge                431     headers_too_large
├── ClientDisconnected             499     client_disconnected    (nobody reads it; it is counted)
├── InternalError                  500     internal_error
├── Unavailable                    503     unavailable
│   ├── Loading                    503     loading
│   ├── Draining                   503     draining
│   └── Dead                       503     engine_dead
└── DeadlineExceeded               504     deadline_exceeded
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.engine.messages import EngineDead, PolicyTableFull

MAX_TEXT = 300  # characters of a message or parameter name; an error never outgrows its request


class ServiceError(Exception):
    """`param` is the JSON path or header that is wrong; `retry_after` is in seconds; `headers` go with the reply."""

    status = 500
    type = "server_error"
    code = "internal_error"
    headers: Mapping[str, str] = {}

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param
        if retry_after is not None:
            self.headers = {**self.headers, "Retry-After": str(retry_after)}

    def to_dict(self) -> dict[str, Any]:
        """The error object that goes into a body or a stream event."""
        param = None if self.param is None else _cut(self.param)
        return {"error": {"message": _cut(self.message), "type": self.type, "param": param, "code": self.code}}


class BadRequest(ServiceError):
    status, type, code = 400, "invalid_request_error", "invalid_request"


class UnsupportedParameter(BadRequest):
    code = "unsupported_parameter"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class InvalidPolicy(BadRequest):
    code = "invalid_policy"


class NoFrontier(BadRequest):
    code = "no_frontier"


class Unauthorized(ServiceError):
    status, type, code = 401, "authentication_error", "invalid_api_key"
    headers = {"WWW-Authenticate": "Bearer"}


class Forbidden(ServiceError):
    status, type, code = 403, "permission_error", "admin_forbidden"


class NotFound(ServiceError):
    status, type, code = 404, "not_found_error", "not_found"


class UnknownModel(NotFound):
    code = "model_not_found"


class UnknownPolicy(NotFound):
    code = "unknown_policy"


class MethodNotAllowed(ServiceError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class RequestTimeout(ServiceError):
    """The client took too long to send the request. What is left of it is not waited for."""

    status, type, code = 408, "invalid_request_error", "request_timeout"
    headers = {"Connection": "close"}


class Conflict(ServiceError):
    status, type, code = 409, "conflict_error", "conflict"


class PolicyInUse(Conflict):
    code = "policy_in_use"


class NoPreviousDefault(Conflict):
    code = "no_previous_default"


class TableFull(Conflict):
    code = "policy_table_full"


class PreconditionFailed(ServiceError):
    status, type, code = 412, "invalid_request_error", "precondition_failed"


class BodyTooLarge(ServiceError):
    status, type, code = 413, "invalid_request_error", "body_too_large"


class UnsupportedMediaType(ServiceError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class QueueFull(ServiceError):
    status, type, code = 429, "rate_limit_error", "queue_full"


class HeadersTooLarge(ServiceError):
    status, type, code = 431, "invalid_request_error", "headers_too_large"


class ClientDisconnected(ServiceError):
    status, type, code = 499, "invalid_request_error", "client_disconnected"


class InternalError(ServiceError):
    pass


class Unavailable(ServiceError):
    status, code = 503, "unavailable"


class Loading(Unavailable):
    code = "loading"


class Draining(Unavailable):
    code = "draining"


class Dead(Unavailable):
    code = "engine_dead"


class DeadlineExceeded(ServiceError):
    status, code = 504, "deadline_exceeded"
    headers = {"X-Should-Retry": "false"}  # official clients would do the same work again


def statuses(error: type[ServiceError] = ServiceError) -> dict[str, int]:
    """The HTTP status of every code in the tree."""
    return {
        error.code: error.status,
        **{code: status for each in error.__subclasses__() for code, status in statuses(each).items()},
    }


def to_service_error(error: Exception) -> ServiceError:
    """What a client is told about any exception. Unforeseen ones say nothing of what is inside."""
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
    # ASCII escapes: a message may quote text that has no UTF-8 form.
    body = json.dumps(error.to_dict()).encode()
    return Response(body, error.status, error.headers, media_type="application/json")


def json_path(location: Sequence[int | str]) -> str:
    """("messages", 0, "content") -> "messages[0].content"."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _from_validation(error: RequestValidationError) -> ServiceError:
    first = error.errors()[0]
    where, location = first["loc"][0], first["loc"][1:]
    if first["type"] == "json_invalid":
        return BadRequest(f"the body is not valid JSON: {first['ctx']['error']} at character {location[0]}")
    if not location:  # about the whole body: fields that do not go together, or no object at all
        return BadRequest(first["msg"] if isinstance(first["input"], dict) else "the body must be a JSON object")
    param = json_path(location)
    message = f"{param}: {first['msg']}" if where == "body" else f"{where} {param}: {first['msg']}"
    if first["type"] == "extra_forbidden":  # where a field that nobody knows would change what the others ask for
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


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
