"""The HTTP door: httpx, and server-sent events as the standard splits them."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
from httpx_sse import EventSource, SSEError

from shardline_client import http_wire
from shardline_client.errors import ConnectionFailed, RequestTimeout, ServerError
from shardline_client.requests import Generate, Tokenize
from shardline_client.results import Model, Tokens
from shardline_client.settings import Settings
from shardline_client.transport import Generated


class HttpTransport:
    """One pool of connections, which closing a response in the middle takes one out of."""

    def __init__(self, settings: Settings) -> None:
        self._openai_only = settings.openai_only
        key = settings.api_key
        verify = settings.tls.ssl_context() if settings.tls is not None else True
        self._client = httpx.AsyncClient(
            base_url=settings.http_base,
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            # How long the whole may take is the caller's clock; only connecting has its own.
            timeout=httpx.Timeout(None, connect=settings.connect_timeout_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
            verify=verify,
        )

    async def generate(
        self, request: Generate, timeout_s: float | None
    ) -> AsyncGenerator[Generated, None]:
        """A POST whose answer is a stream; leaving it closes the connection."""
        body = http_wire.body(request, openai_only=self._openai_only)
        reader = http_wire.ChunkReader(request)
        is_done = False
        async with (
            self._answer("POST", http_wire.path(request), body) as response,
            aclosing(EventSource(response).aiter_sse()) as events,
        ):
            async for event in events:  # to the last byte, so that the connection can be used again
                is_done = is_done or event.data == "[DONE]"
                if not is_done:
                    for part in reader.read(json.loads(event.data)):
                        yield part
        if not is_done:
            raise ConnectionFailed("The stream ended before it was complete.")

    async def tokenize(self, request: Tokenize, timeout_s: float | None) -> Tokens:
        """POST /tokenize."""
        body = http_wire.tokenize_body(request)
        async with self._answer("POST", "/tokenize", body) as response:
            await response.aread()
            return http_wire.tokens(response.json())

    async def models(self, timeout_s: float | None) -> tuple[Model, ...]:
        """GET /v1/models."""
        async with self._answer("GET", "/v1/models") as response:
            await response.aread()
            return http_wire.models(response.json())

    async def abort(self, request_id: str, timeout_s: float | None) -> bool:
        """HTTP knows a request only by its connection, and that is the other client's."""
        return False

    async def aclose(self) -> None:
        """Close the pool."""
        await self._client.aclose()

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """A response with status 200. Raises ClientError for every other end."""
        content = None if body is None else json.dumps(body)
        headers = None if body is None else {"Content-Type": "application/json"}
        try:
            async with self._client.stream(
                method, path, content=content, headers=headers
            ) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    raise http_wire.error_of(response.status_code, response.text, response.headers)
                yield response
        except httpx.ConnectTimeout as error:
            raise ConnectionFailed(f"No connection in time to {self._client.base_url}.") from error
        except httpx.TimeoutException as error:
            raise RequestTimeout("The server did not answer in time.") from error
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
            raise ConnectionFailed(f"{self._client.base_url}: {reason}") from error
        except (SSEError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ServerError(f"The server's answer cannot be read: {error!r}") from error
