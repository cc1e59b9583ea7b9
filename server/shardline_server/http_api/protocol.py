"""What a connection may send: how long its headers are, and how long a request takes to arrive.

uvicorn has a limit for neither with httptools.
"""

import asyncio
import http

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shardline_server.door_config import DoorLimits
from shardline_server.errors import HeadersTooLarge, ShardlineError, SlowRequest
from shardline_server.http_api.errors import error_body


class GuardedProtocol(HttpToolsProtocol):
    """One connection. `limits` is set by `guarded_protocol`."""

    limits: DoorLimits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request has from now on the time to arrive whole."""
        super().connection_made(transport)
        self._is_refused = False
        self._in_headers = True
        self._num_header_bytes = 0
        self._read_timer: asyncio.TimerHandle | None = None
        self._start_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there to be waited for."""
        self._stop_reading()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a piece of a request, unless its headers have grown too long."""
        if self._is_refused:
            return
        was_in_headers = self._in_headers
        super().data_received(data)
        if was_in_headers and self._in_headers:
            self._num_header_bytes += len(data)
            self._check_headers(self._num_header_bytes)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_headers = True
        self._num_header_bytes = 0
        self._start_reading()

    def on_headers_complete(self) -> None:
        """Start the request, if its headers are not too long."""
        self._in_headers = False
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if self._check_headers(size):
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is here."""
        self._stop_reading()
        if not self._is_refused:
            super().on_message_complete()

    def _start_reading(self) -> None:
        if self._read_timer is None:
            limit_s = self.limits.read_timeout_s
            error = SlowRequest(f"The request was not here within {limit_s:g} s.")
            self._read_timer = self.loop.call_later(limit_s, self._refuse, error)

    def _check_headers(self, size: int) -> bool:
        limit = self.limits.max_header_bytes
        if size > limit:
            self._refuse(HeadersTooLarge(f"The headers are longer than {limit} bytes."))
        return size <= limit

    def _refuse(self, error: ShardlineError) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self.transport.write(_raw_response(error))
        self.transport.close()

    def _stop_reading(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None


def guarded_protocol(limits: DoorLimits) -> type[GuardedProtocol]:
    """The class that uvicorn makes one of for each connection."""
    return type("LimitedProtocol", (GuardedProtocol,), {"limits": limits})


def _raw_response(error: ShardlineError) -> bytes:
    body = error_body(error)
    status = http.HTTPStatus(error.http_status)
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
