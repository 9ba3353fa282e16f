"""uvicorn's HTTP protocol, with limits on clients that send too much, send too slowly, or do not read.

uvicorn itself has no limit on the size of a request's line and headers, waits for them for ever, and keeps a connection whose
client has stopped reading. Limits on bodies are the middleware's task (`server.api.http.bodies`).

uvicorn also drops the body of a request that asks for another protocol, and the answer to a client that has closed its sending
side. Here both get their answer (RFC 9110 7.8, RFC 9112 9.6).
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.http.middleware import MAX_HEAD_BYTES
from server.errors import BadRequest, HeadersTooLarge, RequestTimeout, ServiceError

HEADER_SECONDS, SEND_SECONDS = 10.0, 60.0
# A client that has closed its sending side may have closed the whole connection. Only sending to it shows which. So interim
# responses are sent, which every HTTP/1.1 client skips. The first one resets a closed connection, and a later one notices this.
PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"
PROBE_SECONDS = (0.25, 2.0)  # the delays after the first probe
HALF_CLOSED = "half_closed"  # the name in a request's state of the event that is set when its client closes its sending side


class Alarm:
    """Calls `ring` once, `seconds` after `start`, unless it is stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, ring: Callable[[], None]) -> None:
        self.seconds = seconds
        self._loop, self._ring = loop, ring
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Does nothing if the alarm is running already."""
        if self._handle is None:
            self._handle = self._loop.call_later(self.seconds, self._rung)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _rung(self) -> None:
        self._handle = None
        self._ring()


class UpgradeIgnoringParser:
    """httptools' parser, made to ignore requests for another protocol.

    httptools stops after the headers of such a request. The request is then parsed again without its Upgrade header, together
    with the data that follows. `head` returns its line and headers without that header.
    """

    def __init__(self, make: Callable[[], Any], head: Callable[[], bytes]) -> None:
        self._make, self._head = make, head
        self._parser = make()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    @property
    def ignores(self) -> bool:
        """Whether the current request asks for another protocol, so that it will be parsed again."""
        return bool(self._parser.should_upgrade()) and self._parser.get_method() != b"CONNECT"

    def feed_data(self, data: bytes) -> None:
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stopped:
                if not self.ignores:
                    raise
                data = self._head() + data[stopped.args[0] :]
                self._parser = self._make()


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes the connection of a client that exceeds one of three limits.

    - The line and headers exceed MAX_HEAD_BYTES before they are complete: the answer is 431.
    - They are not complete `header_timeout` seconds after their beginning: the answer is 408. If they have not even begun, the
      connection is closed without an answer.
    - The client does not read an answer for `send_timeout` seconds.

    The middleware measures headers that come in a single piece of data.
    """

    def __init__(
        self, *args: Any, header_timeout: float = HEADER_SECONDS, send_timeout: float = SEND_SECONDS, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._upgrades = UpgradeIgnoringParser(self._make_parser, self._plain_head)
        self.parser = cast(httptools.HttpRequestParser, self._upgrades)
        self._probe_handle: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0
        self._head_alarm = Alarm(self.loop, header_timeout, self._give_up_head)
        self._send_alarm = Alarm(self.loop, send_timeout, self._give_up_reader)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_alarm.start()

    def data_received(self, data: bytes) -> None:
        began = self._in_head
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._answered:  # blank lines, the beginning of a request, or the rest of a body that is not needed
            self._head_alarm.start()
        if began and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadersTooLarge(f"the request's line and headers are larger than {MAX_HEAD_BYTES} bytes"))

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._head_alarm.stop()
        self._head_alarm.start()
        super().on_message_begin()
        self._half_closed = asyncio.Event()
        self.scope["state"][HALF_CLOSED] = self._half_closed

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_alarm.stop()
        if not self._upgrades.ignores:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._upgrades.ignores:
            super().on_message_complete()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether the connection stays open. It does if the last request is complete and not yet answered."""
        if self._answered or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        self._half_closed.set()
        if self.scope["http_version"] == "1.1":  # earlier versions have no interim responses
            self._probe(PROBE_SECONDS)
        return True  # after an answer has begun, `EventStream` probes

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_alarm.start()

    def resume_writing(self) -> None:
        self._send_alarm.stop()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():  # too little to pause writing, but perhaps never read
            self._send_alarm.start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_alarm.stop()
        self._send_alarm.stop()
        if self._probe_handle is not None:
            self._probe_handle.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequest(msg))

    @property
    def _answered(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def _make_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return parser

    def _plain_head(self) -> bytes:
        """The line and headers of the current request, without its Upgrade header."""
        line = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        return line + b"".join(headers) + b"\r\n"

    def _probe(self, delays: Sequence[float]) -> None:
        """Send an interim response now and after each delay, until the answer begins."""
        if self.transport.is_closing() or self.pipeline or self.cycle.response_started:
            return
        self.transport.write(PROBE)
        if delays:
            self._probe_handle = self.loop.call_later(delays[0], self._probe, delays[1:])

    def _give_up_head(self) -> None:
        if self._in_head:
            self._refuse(RequestTimeout(f"the request's headers were not complete after {self._head_alarm.seconds:g} seconds"))
        else:
            self.transport.close()

    def _give_up_reader(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _refuse(self, error: ServiceError) -> None:
        """Close the connection. An error is sent first, unless another answer is in progress."""
        if self._answered:
            body = json.dumps(error.to_dict()).encode()
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nContent-Type: application/json\r\n"
                f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


def bounded_http(header_timeout: float, send_timeout: float) -> type[asyncio.Protocol]:
    """The class from which uvicorn makes each connection's protocol. Times are in seconds."""
    made = partial(BoundedHttpProtocol, header_timeout=header_timeout, send_timeout=send_timeout)
    return cast(type[asyncio.Protocol], made)
