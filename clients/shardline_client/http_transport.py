"""The HTTP door: aiohttp, whose costs for a request do not grow with how many there are."""

import json
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from shardline_client import http_wire
from shardline_client.errors import ConnectionFailed, RequestTimeout, ServerError
from shardline_client.requests import Generate, Tokenize
from shardline_client.results import Model, Tokens
from shardline_client.settings import Settings
from shardline_client.sse import DataReader
from shardline_client.transport import Generated

_EVENT_STREAM = "text/event-stream"
# Servers keep idle connections for about as long; uvicorn for exactly so long.
_KEEP_ALIVE_S = 5.0


class HttpTransport:
    """One pool of connections, which closing a response in the middle takes one out of."""

    def __init__(self, settings: Settings) -> None:
        self._base = settings.http_base
        self._openai_only = settings.openai_only
        key = settings.api_key
        tls = settings.tls.ssl_context() if settings.tls is not None else True
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=tls, keepalive_timeout=_KEEP_ALIVE_S),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            # How long the whole may take is the caller's clock; only connecting has its own.
            timeout=aiohttp.ClientTimeout(connect=settings.connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=_proxy_for(self._base),
            trace_configs=[_tracing()],
        )

    async def generate(
        self, request: Generate, timeout_s: float | None
    ) -> AsyncGenerator[Generated, None]:
        """A POST whose answer is a stream; leaving it closes the connection."""
        body = http_wire.body(request, openai_only=self._openai_only)
        chunks, events = http_wire.ChunkReader(request), DataReader()
        is_done = False
        async with self._answer("POST", http_wire.path(request), body) as response:
            if response.content_type != _EVENT_STREAM:
                raise ServerError(f"The answer is {response.content_type}, not {_EVENT_STREAM}.")
            async for piece in response.content.iter_any():  # to the last byte, to be used again
                for data in events.feed(piece):
                    is_done = is_done or data == "[DONE]"
                    if not is_done:
                        for part in chunks.read(json.loads(data)):
                            yield part
        if not is_done:
            raise ConnectionFailed("The stream ended before it was complete.")

    async def tokenize(self, request: Tokenize, timeout_s: float | None) -> Tokens:
        """POST /tokenize."""
        body = http_wire.tokenize_body(request)
        async with self._answer("POST", "/tokenize", body) as response:
            return http_wire.tokens(json.loads(await response.text()))

    async def models(self, timeout_s: float | None) -> tuple[Model, ...]:
        """GET /v1/models."""
        async with self._answer("GET", "/v1/models") as response:
            return http_wire.models(json.loads(await response.text()))

    async def abort(self, request_id: str, timeout_s: float | None) -> bool:
        """HTTP knows a request only by its connection, and that is the other client's."""
        return False

    async def aclose(self) -> None:
        """Close the pool."""
        await self._session.close()

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response with status 200. Raises ClientError for every other end."""
        try:
            async with await self._send(method, path, body) as response:
                if response.status != 200:
                    text = await response.text(errors="replace")
                    raise http_wire.error_of(response.status, text, response.headers)
                yield response
        except aiohttp.ConnectionTimeoutError as error:
            raise ConnectionFailed(f"No connection in time to {self._base}.") from error
        except aiohttp.ServerTimeoutError as error:
            raise RequestTimeout("The server did not answer in time.") from error
        except (aiohttp.ClientError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise ConnectionFailed(f"{self._base}: {reason}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ServerError(f"The server's answer cannot be read: {error!r}") from error

    async def _send(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> aiohttp.ClientResponse:
        """The answer's beginning. A kept connection that turns out to be closed is no failure: some
        servers close it without a word, and as curl does we send the request again on another.
        """
        content = None if body is None else json.dumps(body).encode()
        headers = None if body is None else {"Content-Type": "application/json"}
        while True:
            trip = _Trip()
            try:
                return await self._session.request(
                    method,
                    self._base + path,
                    data=content,
                    headers=headers,
                    allow_redirects=False,
                    trace_request_ctx=trip,
                )
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if not trip.is_on_kept_connection:
                    raise


@dataclass
class _Trip:
    """What aiohttp tells of one request."""

    is_on_kept_connection: bool = False


def _tracing() -> aiohttp.TraceConfig:
    async def note(
        session: aiohttp.ClientSession,
        context: SimpleNamespace,
        told: aiohttp.TraceConnectionReuseconnParams,
    ) -> None:
        context.trace_request_ctx.is_on_kept_connection = True

    tracing = aiohttp.TraceConfig()
    tracing.on_connection_reuseconn.append(note)
    return tracing


def _proxy_for(url: str) -> str | None:
    """What HTTP_PROXY and its like say of this server; looked up once, not for each request."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)
