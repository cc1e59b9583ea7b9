"""The client for asyncio; the blocking one is made of it."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from shardline_client import requests
from shardline_client.errors import InvalidRequest, RequestTimeout
from shardline_client.requests import (
    ChatOptions,
    CompleteOptions,
    Generate,
    Messages,
    Prompt,
)
from shardline_client.results import Completion, Model, Tokens
from shardline_client.retries import attempts
from shardline_client.settings import ClientOptions, Patience, Settings
from shardline_client.stream import AsyncStream
from shardline_client.transport import Transport, open_transport

T = TypeVar("T")


class AsyncClient:
    """One server, over the door that the address names: http://, https://, grpc://, grpcs://.

    Connections are opened by the first call, shared by all, and closed by `aclose()` or `async
    with`. All calls are made in one event loop. They raise ClientError (see `errors`).
    """

    def __init__(self, url: str, **options: Unpack[ClientOptions]) -> None:
        self.settings = Settings(url=url, **options)
        self._has_own_timeout = "timeout_s" in options
        self._transport: Transport | None = None
        self._is_closed = False
        self._streams: dict[str, AsyncStream] = {}

    async def complete(self, prompt: Prompt, **options: Unpack[CompleteOptions]) -> Completion:
        """Continue a text, or token ids."""
        return await self.stream_complete(prompt, **options).collect()

    async def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Completion:
        """Answer a conversation."""
        return await self.stream_chat(messages, **options).collect()

    def stream_complete(self, prompt: Prompt, **options: Unpack[CompleteOptions]) -> AsyncStream:
        """The same as `complete`, in pieces."""
        request_id, model = self._names(options)
        request = requests.completion_request(prompt, options, request_id=request_id, model=model)
        return self._stream(request, options)

    def stream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> AsyncStream:
        """The same as `chat`, in pieces."""
        request_id, model = self._names(options)
        request = requests.chat_request(messages, options, request_id=request_id, model=model)
        return self._stream(request, options)

    async def tokenize(self, prompt: str | Messages, *, model: str | None = None) -> Tokens:
        """The token ids of a text, or of a conversation in the model's chat template."""
        request = requests.tokenize_request(prompt, model=model or self.settings.model)
        return await self._call(lambda door, timeout_s: door.tokenize(request, timeout_s))

    async def models(self) -> tuple[Model, ...]:
        """The names that the server answers to, its first model first."""
        return await self._call(lambda door, timeout_s: door.models(timeout_s))

    async def abort(self, request_id: str) -> bool:
        """End a running request; its reader gets finish_reason "abort". False if none ran.

        Over gRPC also a request that another client started; over HTTP only one of this client's,
        since there a request is known by its connection alone.
        """
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.abort()
            return True
        return await self._call(lambda door, timeout_s: door.abort(request_id, timeout_s))

    async def aclose(self) -> None:
        """End what runs, and close the connections."""
        self._is_closed = True
        for stream in list(self._streams.values()):
            await stream.aclose()
        if self._transport is not None:
            await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def open(self) -> Transport:
        """The door, opened where it was not yet. For streams."""
        if self._is_closed:
            raise RuntimeError("This client is closed.")
        if self._transport is None:
            self._transport = open_transport(self.settings)
        return self._transport

    def register(self, stream: AsyncStream) -> None:
        """For streams. Raises InvalidRequest for an id in use."""
        if self._streams.setdefault(stream.request_id, stream) is not stream:
            message = f"request_id {stream.request_id} is in use."
            raise InvalidRequest(message, param="request_id")

    def unregister(self, stream: AsyncStream) -> None:
        """For streams."""
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]

    def _names(self, options: Mapping[str, Any]) -> tuple[str, str | None]:
        """Request id and model; an id is made up where none is given."""
        model = options.get("model") or self.settings.model
        return options.get("request_id") or uuid.uuid4().hex, model

    def _stream(self, request: Generate, options: Mapping[str, Any]) -> AsyncStream:
        patience = Patience(
            limit_s=options.get("timeout_s", self.settings.timeout_s),
            is_told="timeout_s" in options or self._has_own_timeout,
        )
        return AsyncStream(request, self, self.settings.retry, patience)

    async def _call(self, method: Callable[[Transport, float | None], Awaitable[T]]) -> T:
        timeout_s = self.settings.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                async for attempt in attempts(self.settings.retry):
                    with attempt:
                        return await method(self.open(), timeout_s)
        except TimeoutError as error:
            raise RequestTimeout(f"No answer within {timeout_s} s.") from error
        raise AssertionError("the last attempt raises")
