"""How an answer reaches a client that may go away at any time: whole, or as server-sent events."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import ExitStack
from typing import Protocol, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from shardline_server.choice import Piece
from shardline_server.errors import ShardlineError
from shardline_server.generation import Generation
from shardline_server.http_api.errors import error_body

logger = logging.getLogger("shardline.frontend")

T = TypeVar("T")
CLIENT_CLOSED_REQUEST = 499  # nginx's status for the log; nobody is there to read it


class Renderer(Protocol):
    """Turns a Generation into one endpoint's JSON."""

    includes_usage: bool

    def whole(self, choices: list[Piece]) -> BaseModel:
        """The answer that is not streamed."""

    def chunks(self, piece: Piece) -> Iterable[BaseModel]:
        """A piece's chunks of the stream; none where the client would see nothing new."""

    def usage_chunk(self) -> BaseModel:
        """The last chunk, for clients that asked for it."""


class ClientGone(Exception):
    """The connection was closed before the answer was there."""


async def deliver(
    request: Request, generation: Generation, renderer: Renderer, *, stream: bool
) -> Response:
    """Run a Generation and answer with it.

    The engine's requests are aborted as soon as the client disconnects. An error before the first
    piece is raised, so that a stream too can still be refused with a status.
    """
    headers = {"X-Request-Id": generation.request_id}
    with ExitStack() as stack:
        stack.enter_context(generation)
        try:
            if not stream:
                choices = await _while_connected(request, generation.collect())
                body = renderer.whole(choices).model_dump_json()
                return Response(body, headers=headers, media_type="application/json")
            pieces = generation.pieces()
            first = await _while_connected(request, _next(pieces))
            events = _events(first, pieces, renderer)
            return EventStream(events, stack.pop_all(), headers)
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)


class EventStream(StreamingResponse):
    """Server-sent events; when it ends, or the client leaves, what `resources` holds is closed."""

    def __init__(
        self, events: AsyncIterator[bytes], resources: ExitStack, headers: dict[str, str]
    ) -> None:
        unbuffered = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers | unbuffered, media_type="text/event-stream")
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop when the client disconnects."""
        with self._resources:
            await super().__call__(scope, receive, send)


async def _events(
    first: Piece, pieces: AsyncIterator[Piece], renderer: Renderer
) -> AsyncIterator[bytes]:
    try:
        for chunk in renderer.chunks(first):
            yield _event(chunk)
        async for piece in pieces:
            for chunk in renderer.chunks(piece):
                yield _event(chunk)
        if renderer.includes_usage:
            yield _event(renderer.usage_chunk())
        yield b"data: [DONE]\n\n"
    except Exception as error:
        if not isinstance(error, ShardlineError):
            logger.exception("A stream failed")
        yield b"data: " + error_body(error) + b"\n\n"


def _event(chunk: BaseModel) -> bytes:
    return b"data: " + chunk.model_dump_json().encode() + b"\n\n"


async def _next(pieces: AsyncIterator[T]) -> T:
    return await anext(pieces)


async def _while_connected(request: Request, work: Coroutine[None, None, T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects: then ClientGone."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for unfinished in (task, watch):
            unfinished.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
