"""What stands around every call: the API key, and one mapping from exceptions to status codes."""

import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from grpc.aio import ServicerContext

from shardline_server.api_keys import ApiKeys, bearer_token
from shardline_server.errors import ShardlineError

logger = logging.getLogger("shardline.frontend")

# Generic for type checkers only: grpc's classes cannot be subscripted when the code runs.
Context: TypeAlias = "ServicerContext[Any, Any]"
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
        key = bearer_token(str(metadata.get("authorization", "")))
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(handler.unary_stream, key),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary, key),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _unary(self, behaviour: Any, key: str | None) -> Any:
        async def guarded(request: Any, context: Context) -> Any:
            try:
                self._keys.check(key)
                return await behaviour(request, context)
            except Exception as error:
                await _abort(context, error)

        return guarded

    def _streaming(self, behaviour: Any, key: str | None) -> Any:
        async def guarded(request: Any, context: Context) -> None:
            try:
                self._keys.check(key)
                async with aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        await context.write(response)
            except Exception as error:
                await _abort(context, error)

        return guarded


async def _abort(context: Context, error: Exception) -> None:
    if not isinstance(error, ShardlineError):
        logger.error("A gRPC call failed", exc_info=error)
        error = ShardlineError("An internal error occurred; the server's log says more.")
    details = {"shardline-error-code": error.code, "shardline-error-param": error.param}
    trailing = tuple((key, value) for key, value in details.items() if value is not None)
    await context.abort(grpc.StatusCode[error.grpc_code], error.message, trailing)
