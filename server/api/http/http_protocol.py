"""uvicorn's HTTP protocol with limits on clients that send without end, or hardly at all, or do not read.

uvicorn collects a request's line and headers in memory however long they are, waits for them for ever, and keeps a connection
whose client has stopped reading. Bodies are the middleware's to bound and to time.

It also drops the body of a request that asks for another protocol, and the answer for a client that has closed its sending
side. Both get their answer here (RFC 9110 7.8, RFC 9112 9.6).
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
# A client that has closed its sending side may have closed the connection. Whether it has, only sending to it shows. An interim
# response is what every HTTP/1.1 client skips: the first one makes a closed connection reset, a later one finds that it is.
PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"
PROBE_SECONDS = (0.25, 2.0)  # after the first
HALF_CLOSED = "half_closed"  # in a request's state: the event that its client has closed its sending side


class Alarm:
    """Rings once, `seconds` after it was started, unless it is stopped."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, ring: Callable[[], None]) -> None:
        self.seconds = seconds
        self._loop, self._ring = loop, ring
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Does nothing while it runs."""
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
    """httptools' parser, which ends at the headers of a request that asks to change the protocol. Such a request is parsed
    again, as if it had not asked, together with what follows its headers. `head` gives its line and headers without the
    question."""

    def __init__(self, make: Callable[[], Any], head: Callable[[], bytes]) -> None:
        self._make, self._head = make, head
        self._parser = make()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    @property
    def ignores(self) -> bool:
        """The request that is being parsed is one of them, and will be parsed again."""
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
    """Answers 431 and closes when more than MAX_HEAD_BYTES have come and the headers are still not complete, and 408 when they
    are not complete `header_timeout` seconds after their beginning (without a word where they have not begun); cuts the
    connection when an answer has lain unread for `send_timeout` seconds.

    Headers that end within the piece of data that they began in are the middleware's to measure.
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
        if self._answered:  # blank lines, the beginning of a request, or more of a body that nobody waits for
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
        """Whether the connection stays open for an answer: when the last request is complete and not yet answered."""
        if self._answered or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        self._half_closed.set()
        if self.scope["http_version"] == "1.1":  # interim responses are unknown to earlier ones
            self._probe(PROBE_SECONDS)
        return True  # an answer that has begun probes by itself: `EventStream`

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_alarm.start()

    def resume_writing(self) -> None:
        self._send_alarm.stop()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():  # less than what pauses writing, and perhaps never read
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
        """No request is being worked on."""
        return self.cycle is None or self.cycle.response_complete

    def _make_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return parser

    def _plain_head(self) -> bytes:
        """The line and headers of the request that is being parsed, without the question for another protocol."""
        line = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        return line + b"".join(headers) + b"\r\n"

    def _probe(self, delays: Sequence[float]) -> None:
        """Send interim responses until the answer begins or the delays are used up."""
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
        """Close, with an answer unless that would come in the middle of another one."""
        if self._answered:
            body = json.dumps(error.to_dict()).encode()
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nContent-Type: application/json\r\n"
                f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


def bounded_http(header_timeout: float, send_timeout: float) -> type[asyncio.Protocol]:
    """What uvicorn makes each connection's protocol with; times in seconds."""
    made = partial(BoundedHttpProtocol, header_timeout=header_timeout, send_timeout=send_timeout)
    return cast(type[asyncio.Protocol], made)
