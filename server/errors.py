"""All errors that a client can get, as one class tree. The HTTP layer renders them in OpenAI's format.

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

from collections.abc import Mapping
from typing import Any

MAX_TEXT = 300  # longest message or parameter name, in characters; longer ones are cut


class ServiceError(Exception):
    """The base of all errors. `param`: the wrong JSON path or header. `retry_after`: seconds. `headers`: sent with the
    reply. `facts`: more fields of the error object."""

    status = 500
    type = "server_error"
    code = "internal_error"
    headers: Mapping[str, str] = {}
    facts: Mapping[str, Any] = {}

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param
        if retry_after is not None:
            self.headers = {**self.headers, "Retry-After": str(retry_after)}

    def to_dict(self) -> dict[str, Any]:
        """The error object of a body or a stream event."""
        param = None if self.param is None else _cut(self.param)
        return {"error": {"message": _cut(self.message), "type": self.type, "param": param, "code": self.code, **self.facts}}


class BadRequest(ServiceError):
    """The request has a wrong field, or a value that this server does not allow."""

    status, type, code = 400, "invalid_request_error", "invalid_request"


class UnsupportedParameter(BadRequest):
    """A known or unknown field that this server does not support."""

    code = "unsupported_parameter"


class ContextLengthExceeded(BadRequest):
    """The prompt and the answer do not fit into the context."""

    code = "context_length_exceeded"


class InvalidPolicy(BadRequest):
    """The JSON of a policy or of a default is wrong."""

    code = "invalid_policy"


class NoFrontier(BadRequest):
    """An accuracy was asked for, but the checkpoint has no measured frontier."""

    code = "no_frontier"


class Unauthorized(ServiceError):
    """The key is missing or wrong."""

    status, type, code = 401, "authentication_error", "invalid_api_key"
    headers = {"WWW-Authenticate": "Bearer"}


class Forbidden(ServiceError):
    """The admin routes are closed, or closed to this caller."""

    status, type, code = 403, "permission_error", "admin_forbidden"


class NotFound(ServiceError):
    """There is no such route or file."""

    status, type, code = 404, "not_found_error", "not_found"


class UnknownModel(NotFound):
    """There is no model of this name."""

    code = "model_not_found"


class UnknownPolicy(NotFound):
    """There is no policy of this name."""

    code = "unknown_policy"


class MethodNotAllowed(ServiceError):
    """The route does not have this method."""

    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class RequestTimeout(ServiceError):
    """The client took too long to send the request. The connection is closed without waiting for the rest."""

    status, type, code = 408, "invalid_request_error", "request_timeout"
    headers = {"Connection": "close"}


class Conflict(ServiceError):
    """The action does not fit the current state."""

    status, type, code = 409, "conflict_error", "conflict"


class PolicyInUse(Conflict):
    """The policy is the default or the canary, or a service tier uses it."""

    code = "policy_in_use"


class NoPreviousDefault(Conflict):
    """There is no earlier default to roll back to."""

    code = "no_previous_default"


class NoCanary(Conflict):
    """There is no canary to promote or roll back."""

    code = "no_canary"


class TableFull(Conflict):
    """Requests hold so many rows of the policy table that the new default gets none."""

    code = "policy_table_full"


class PreconditionFailed(ServiceError):
    """The condition of If-Match or If-None-Match does not hold."""

    status, type, code = 412, "invalid_request_error", "precondition_failed"


class BodyTooLarge(ServiceError):
    """The body is too large, before or after decompression."""

    status, type, code = 413, "invalid_request_error", "body_too_large"


class UnsupportedMediaType(ServiceError):
    """The body has another type or encoding than the route reads."""

    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class QueueFull(ServiceError):
    """Too many sequences or prompt tokens are waiting. `accuracy`: at this accuracy or less, the request would be served now;
    None: it would not be served at any."""

    status, type, code = 429, "rate_limit_error", "queue_full"

    def __init__(self, message: str, *, retry_after: int, accuracy: float | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        if accuracy is not None:
            self.facts = {"accuracy": accuracy}


class HeadersTooLarge(ServiceError):
    """The headers are too large."""

    status, type, code = 431, "invalid_request_error", "headers_too_large"


class ClientDisconnected(ServiceError):
    """The client left before it had its answer."""

    status, type, code = 499, "invalid_request_error", "client_disconnected"


class InternalError(ServiceError):
    """A fault of the server."""


class Unavailable(ServiceError):
    """The server cannot answer now."""

    status, code = 503, "unavailable"


class Loading(Unavailable):
    """The model is still loading."""

    code = "loading"


class Draining(Unavailable):
    """The server is shutting down and accepts no new requests."""

    code = "draining"


class Dead(Unavailable):
    """The engine has stopped."""

    code = "engine_dead"


class DeadlineExceeded(ServiceError):
    """The request was not finished before its deadline."""

    status, code = 504, "deadline_exceeded"
    headers = {"X-Should-Retry": "false"}  # otherwise OpenAI's clients would repeat the request


def statuses(error: type[ServiceError] = ServiceError) -> dict[str, int]:
    """The HTTP status of every code in the tree."""
    return {
        error.code: error.status,
        **{code: status for each in error.__subclasses__() for code, status in statuses(each).items()},
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
