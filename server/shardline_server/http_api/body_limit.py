"""No request body longer than the operator allows, whatever its headers say."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shardline_server.errors import RequestTooLarge
from shardline_server.http_api.errors import error_response


class BodyLimit:
    """ASGI middleware; a body that is too long is answered with 413, and not kept."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await error_response(self._error())(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                error = self._error()
                raise HTTPException(error.http_status, error.message) from error
            return message

        await self._app(scope, counted, send)

    def _error(self) -> RequestTooLarge:
        return RequestTooLarge(
            f"The request is longer than the {self._max_bytes} bytes that are allowed."
        )
