"""What stands around every call: the API key, and one mapping from exceptions to status codes."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc.aio import ServicerContext

from shardline_server.api_keys import TENANT_HEADER, ApiKeys, bearer_token
from shardline_server.errors import InvalidRequest, ShardlineError
from shardline_server.grpc_api.details import trailing_metadata

logger = logging.getLogger("shardline.frontend")

# Generic for type checkers only: grpc's classes cannot be subscripted when the code runs.
Context: TypeAlias = "ServicerContext[Any, Any]"
Metadata = Mapping[str, str | bytes]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Around the methods of one service; others (health, reflection) pass untouched."""

    def __init__(self, service_name: str, keys: ApiKeys) -> None:
        self._prefix = f"/{service_name}/"
        self._keys = keys

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
                    async for response in responses:
                        await context.write(response)
            except Exception as error:
                await _abort(context, error)

        return guarded


def _parsed(handler: Any, payload: bytes) -> Any:
    """The request message; raises InvalidRequest."""
    try:
        return handler.request_deserializer(payload)
    except DecodeError as error:
        raise InvalidRequest(f"The request's bytes are no message of its type: {error}.") from error


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
