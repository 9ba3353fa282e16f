"""Pure ASGI middleware, outermost first: paths, request context, keys, HEAD.

Starlette's BaseHTTPMiddleware is not used, because it hides from the routes that a client has disconnected.
"""

import hashlib
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from hmac import compare_digest

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs
from server.api.http.failures import error_response, to_service_error
from server.errors import Forbidden, HeadersTooLarge, ServiceError, Unauthorized
from server.policies.route import Binding

access_log = logging.getLogger("server.access")
logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPEN_PATHS = frozenset({"/", "/health", "/health/live", "/health/ready", "/metrics"})
QUIET_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/metrics", "/v1/routing"})  # polled, so logged as debug
STATIC_PREFIX = "/static/"
ADMIN_PREFIX = "/admin/"
# The most bytes of a request's line and headers together. `server.api.http.http_protocol` enforces it, too.
MAX_HEAD_BYTES = 64 * 2**10
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class PlainPaths:
    """Removes trailing and doubled slashes from the path before other code reads it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": re.sub("/{2,}", "/", scope["path"]).rstrip("/") or "/"}
        await self._app(scope, receive, send)


class HeadAsGet:
    """Answers HEAD as GET, without the body (RFC 9110 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, send_head)
        else:
            await self._app(scope, receive, send)


class RequestContext:
    """Gives every request an id, every reply its headers and a log line, and every unhandled exception an answer.

    The header X-Routing-Policy names the request's policy as of then. If the request has none, it names the default policy.
    """

    def __init__(self, app: ASGIApp, default_policy: Callable[[], str], on_failure: Callable[[ServiceError], None]) -> None:
        self._app, self._default_policy, self._on_failure = app, default_policy, on_failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        logs.request_id.set(request_id)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status, started = 0, time.monotonic()

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                binding: Binding | None = state.get("binding")
                headers["X-Routing-Policy"] = self._default_policy() if binding is None else binding.route.policy.name
            await send(message)

        try:
            _check_head(scope)
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            failure = to_service_error(error)
            if failure.status == 500:
                logger.exception("a request failed")
            self._on_failure(failure)
            if status:
                raise
            await error_response(failure)(scope, receive, send_with_headers)
        finally:
            level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
            seconds = time.monotonic() - started
            access_log.log(
                level,
                "%s %s %d %.3fs",
                scope["method"],
                ascii(scope["path"])[1:-1],
                status,
                seconds,
                extra={"client": _client(scope), "status": status, "seconds": round(seconds, 6)},
            )


class Keys:
    """Checks bearer keys. /admin needs the admin key, all other paths need an API key, except the page, health and metrics.

    Without API keys the API is open. Without an admin key /admin is closed. With `open_admin` it is then open to callers that
    use a loopback name for this machine and do not come from another site's page. The path is taken from the ASGI scope and not
    from the URL, which a Host header can change.
    """

    def __init__(self, app: ASGIApp, api_keys: Iterable[str], admin_key: str | None, open_admin: bool) -> None:
        self._app, self._open_admin = app, open_admin
        self._admin = [] if admin_key is None else [_digest(admin_key)]
        self._api = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["caller"] = self._check(scope["path"], Headers(scope=scope))
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> str:
        """A digest that identifies the caller's key; empty if no key is needed. Raises Unauthorized, Forbidden."""
        if path in OPEN_PATHS or path.startswith(STATIC_PREFIX):
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        presented = _digest(key.strip() if scheme.lower() == "bearer" else "")
        if path.startswith(ADMIN_PREFIX):
            self._check_admin(presented, headers)
        elif self._api and not _matches(presented, [*self._api, *self._admin]):
            raise Unauthorized("a valid API key is needed: send the header Authorization: Bearer KEY")
        return presented.hex() if self._api else ""

    def _check_admin(self, presented: bytes, headers: Headers) -> None:
        if self._admin:
            if not _matches(presented, self._admin):
                raise Unauthorized("the admin key is needed: send the header Authorization: Bearer KEY")
            return
        if not self._open_admin:
            raise Forbidden("admin routes are closed: the server was started without --admin-key")
        host = headers.get("host", "")
        if re.sub(r":\d+$", "", host) not in LOOPBACK_NAMES:
            raise Forbidden("admin routes without a key are open to this machine's own names only")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Forbidden("admin routes without a key are closed to other sites' pages")


def _client(scope: Scope) -> str | None:
    """The client's address. A trusted proxy may have replaced its own address by that of its client."""
    return None if scope.get("client") is None else scope["client"][0]


def _check_head(scope: Scope) -> None:
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if size + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD_BYTES:
        raise HeadersTooLarge(f"the request's line and headers are larger than {MAX_HEAD_BYTES} bytes")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _matches(presented: bytes, accepted: list[bytes]) -> bool:
    """Compare with every key, each in constant time."""
    return sum(compare_digest(presented, key) for key in accepted) > 0
