"""Request bodies. They are read within limits and parsed once. Large ones are parsed and validated in threads."""

import asyncio
import zlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.http.json_reader import read_json
from server.errors import BadRequest, BodyTooLarge, RequestTimeout, UnsupportedMediaType

T = TypeVar("T")

# Larger bodies are processed in a thread. A smaller body takes a few milliseconds at most, often less than a thread costs.
INLINE_BYTES = 2**14
# Threads for large bodies. With each further one, the event loop waits a little longer for its turn.
MAX_THREADS = 2
CODINGS = ("gzip", "x-gzip", "deflate")


class BodyWork:
    """Runs work on a body: at once if the body is small, otherwise in one of a few threads."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(MAX_THREADS)

    async def run(self, size: int, work: Callable[..., T], *arguments: Any) -> T:
        if size <= INLINE_BYTES:
            return work(*arguments)
        async with self._places:
            return await asyncio.to_thread(work, *arguments)


@dataclass(frozen=True, slots=True)
class ParsedBody:
    """What JsonBodies leaves in the request's state for JsonRoute. `size`: the bytes of the JSON text."""

    value: Any
    size: int
    work: BodyWork


class JsonBodies:
    """Reads the whole body of each request first, within limits of size and time. Only JSON is accepted.

    `max_bytes`: the largest body, also after decompression.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_seconds: float) -> None:
        self._app, self._max_bytes, self._timeout_seconds = app, max_bytes, timeout_seconds
        self._work = BodyWork()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        if declared.isascii() and declared.isdigit() and int(declared) > self._max_bytes:
            self._refuse()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                body = await self._read(receive)
        except TimeoutError:
            raise RequestTimeout(f"the body was not complete after {self._timeout_seconds:g} seconds") from None
        if body is None:
            return
        if body:
            scope.setdefault("state", {})["body"] = await self._parse(bytes(body), headers)
        await self._app(scope, receive, send)

    async def _read(self, receive: Receive) -> bytearray | None:
        """The whole body; None if the client leaves before its end. Raises BodyTooLarge."""
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_bytes:
                self._refuse()
        return body

    async def _parse(self, body: bytes, headers: Headers) -> ParsedBody:
        """Raises BadRequest, BodyTooLarge, UnsupportedMediaType."""
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise UnsupportedMediaType("the body must be JSON: send the header Content-Type: application/json")
        coding = ", ".join(headers.getlist("content-encoding")).strip().lower()
        if coding not in ("", "identity"):
            if coding not in CODINGS:
                raise _unknown_coding(coding)
            body = await asyncio.to_thread(_unpack, body, self._max_bytes)
        try:
            value = await self._work.run(len(body), read_json, body)
        except ValueError as error:
            raise BadRequest(f"the body is not valid JSON: {error}") from error
        return ParsedBody(value, len(body), self._work)

    def _refuse(self) -> None:
        raise BodyTooLarge(f"the body is larger than {self._max_bytes} bytes")


class JsonRoute(APIRoute):
    """A route whose body JsonBodies has parsed. If the body is large, its wire model is made in a thread, too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        annotation = None if self.body_field is None else self.body_field.field_info.annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None

        async def handle_parsed(request: Request) -> Response:
            body: ParsedBody | None = request.scope["state"].pop("body", None)
            if body is None:
                return await handle(_ParsedRequest(request, has_body=False))
            value, size, work = [body.value], body.size, body.work
            del body  # The thread then has the only reference to the parsed value. Freeing it takes time, too.
            validated = value.pop() if model is None else await work.run(size, _validate, model, value)
            return await handle(_ParsedRequest(request, has_body=True, value=validated))

        return handle_parsed


class _ParsedRequest(Request):
    """FastAPI reads the body only to see whether there is one. Then it reads the JSON value."""

    def __init__(self, request: Request, has_body: bool, value: Any = None) -> None:
        super().__init__(request.scope, request.receive)
        self._has_body, self._value = has_body, value

    async def body(self) -> bytes:
        return b"parsed" if self._has_body else b""

    async def json(self) -> Any:
        return self._value


def _validate(model: type[BaseModel], value: list[Any]) -> BaseModel:
    """Take the only value out of the list, and return its wire model. Raises RequestValidationError, as FastAPI does."""
    try:
        return model.model_validate(value.pop())
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from None


def _unpack(body: bytes, max_bytes: int) -> bytes:
    """Decompress a body in one of CODINGS; zlib detects which. Stops at one byte more than `max_bytes`.

    Raises BadRequest, BodyTooLarge.
    """
    unpacker = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)
    try:
        unpacked = unpacker.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise BadRequest(f"Content-Encoding: the body cannot be unpacked ({error})", param="Content-Encoding") from error
    if len(unpacked) > max_bytes:
        raise BodyTooLarge(f"the body is larger than {max_bytes} bytes when it is unpacked")
    if not unpacker.eof or unpacker.unused_data:
        raise BadRequest("Content-Encoding: the body must be one whole compressed stream", param="Content-Encoding")
    return unpacked


def _unknown_coding(coding: str) -> UnsupportedMediaType:
    message = f"Content-Encoding: {coding!r} is not supported; send the body as it is, or packed with gzip or deflate"
    error = UnsupportedMediaType(message, param="Content-Encoding")
    error.headers = {"Accept-Encoding": "gzip, deflate"}
    return error
