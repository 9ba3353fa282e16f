"""uvicorn's HTTP protocol with a limit on what a client may send before its request begins.

uvicorn collects a request's line and headers in memory however long they are.
"""

import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.middleware import MAX_HEAD_BYTES
from server.errors import HeadersTooLarge


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 431 and closes when more than MAX_HEAD_BYTES have come and the headers are still not complete.

    Headers that end within the piece of data that they began in are the middleware's to measure.
    """

    _in_head = False
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        began = self._in_head
        super().data_received(data)
        if began and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse()

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def _refuse(self) -> None:
        error = HeadersTooLarge(f"the request's line and headers are larger than {MAX_HEAD_BYTES} bytes")
        body = json.dumps(error.to_dict()).encode()
        head = (
            b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        self.transport.write(head + body)
        self.transport.close()
