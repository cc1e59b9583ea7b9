"""What stands around every call: the API key, and one mapping from exceptions to status codes."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc.aio import ServicerContext

from shardline_server.api_keys import TENANT_HEADER, ApiKeys, bearer_token
from shardline_server.errors import InvalidRequest, ReaderTooSlow, ShardlineError
from shardline_server.grpc_api.details import trailing_metadata

logger = logging.getLogger("shardline.frontend")

# Generic for type checkers only: grpc's classes cannot be subscripted when the code runs.
Context: TypeAlias = "ServicerContext[Any, Any]"
Metadata = Mapping[str, str | bytes]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Around the methods of one service; others (health, reflection) pass untouched."""

    def __init__(self, service_name: str, keys: ApiKeys, *, write_timeout_s: float) -> None:
        self._prefix = f"/{service_name}/"
        self._keys = keys
        self._write_timeout_s = write_timeout_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Called by grpc for each new call."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        # Requests are parsed in here: grpc would answer bytes that it cannot parse with UNKNOWN.
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(handler, metadata), None, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler, metadata), None, handler.response_serializer
        )

    def _unary(self, handler: Any, metadata: Metadata) -> Any:
        async def guarded(payload: bytes, context: Context) -> Any:
            try:
                tenant_of(self._keys, metadata)
                return await handler.unary_unary(_parsed(handler, payload), context)
            except Exception as error:
                await _abort(context, error)

        return guarded

    def _streaming(self, handler: Any, metadata: Metadata) -> Any:
        async def guarded(payload: bytes, context: Context) -> None:
            try:
                tenant_of(self._keys, metadata)
                request = _parsed(handler, payload)
                async with aclosing(handler.unary_stream(request, context)) as responses:
                    reader = _Reader(context, responses, self._write_timeout_s)
                    async for response in responses:
                        await reader.write(response)
            except Exception as error:
                await _abort(context, error)

        return guarded


def _parsed(handler: Any, payload: bytes) -> Any:
    """The request message; raises InvalidRequest."""
    try:
        return handler.request_deserializer(payload)
    except DecodeError as error:
        raise InvalidRequest(f"The request's bytes are no message of its type: {error}.") from error


class _Reader:
    """A client, and what is made for it: that ends where a write takes too long."""

    def __init__(self, context: Context, responses: AsyncGenerator[Any, None], limit_s: float):
        self._context = context
        self._responses = responses
        self._limit_s = limit_s
        self._closing: asyncio.Task[None] | None = None

    async def write(self, response: Any) -> None:
        """Raises ReaderTooSlow, when the client reads again at last.

        The write itself goes on until then: grpc can send no status behind one that was given up.
        """
        timer = asyncio.get_running_loop().call_later(self._limit_s, self._give_up)
        try:
            await self._context.write(response)
        finally:
            timer.cancel()
        if self._closing is not None:
            await self._closing
            raise ReaderTooSlow(f"Nothing was read for {self._limit_s:g} s; the request was ended.")

    def _give_up(self) -> None:
        logger.info("A client has read nothing for %g s: its request ends", self._limit_s)
        self._closing = asyncio.create_task(self._responses.aclose())


def tenant_of(keys: ApiKeys, metadata: Metadata) -> str:
    """Whose call it is; raises AuthenticationFailed."""
    values = {key: str(value) for key, value in metadata.items()}
    key = bearer_token(values.get("authorization"))
    return keys.tenant_of(key, values.get(TENANT_HEADER.lower()))


async def _abort(context: Context, error: Exception) -> None:
    if not isinstance(error, ShardlineError):
        logger.error("A gRPC call failed", exc_info=error)
        error = ShardlineError("An internal error occurred; the server's log says more.")
    await context.abort(grpc.StatusCode[error.grpc_code], error.message, trailing_metadata(error))
