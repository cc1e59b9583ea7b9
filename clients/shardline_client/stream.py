"""One streamed answer: begun with retries, held to its time, and ended when it is left."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Protocol, Self

from shardline_client.errors import ClientError, ConnectionFailed, RequestTimeout, StreamBroken
from shardline_client.requests import Generate
from shardline_client.results import BudgetOutcome, Collector, Completion, Piece, Usage
from shardline_client.retries import attempts
from shardline_client.settings import Patience, Retry
from shardline_client.transport import Generated, Transport


class Owner(Protocol):
    """The client that a stream belongs to."""

    def open(self) -> Transport:
        """The door, opened where it was not yet."""

    def register(self, stream: "AsyncStream") -> None:
        """The stream runs. Raises InvalidRequest for an id that another one uses."""

    def unregister(self, stream: "AsyncStream") -> None:
        """The stream has ended."""


class AsyncStream:
    """An answer in pieces, for one `async for`; the request is sent when that begins.

    Leaving the loop (break, an exception, cancellation) ends the request on the server; `async
    with` around it, or `aclose()`, waits until that is done.
    """

    def __init__(self, request: Generate, owner: Owner, retry: Retry, patience: Patience) -> None:
        self._request = request
        self._owner = owner
        self._retry = retry
        self._patience = patience
        self._collector = Collector(num_choices=request.num_choices)
        self._parts: AsyncGenerator[Generated, None] | None = None
        self._deadline: float | None = None
        self._step: asyncio.Timeout | None = None
        self._is_read = False
        self._is_left = False
        self._is_aborted = False

    @property
    def request_id(self) -> str:
        """The id to abort it by."""
        return self._request.request_id

    @property
    def usage(self) -> Usage | None:
        """What the request took; None until the stream has ended by itself."""
        return self._collector.usage

    @property
    def latency_budget(self) -> BudgetOutcome | None:
        """How its latency budget was kept; None until the stream has ended by itself."""
        return self._collector.latency_budget

    @property
    def completion(self) -> Completion:
        """What has come so far, put together."""
        return self._collector.completion(self.request_id)

    async def collect(self) -> Completion:
        """Read to the end; the whole answer."""
        async with aclosing(self.__aiter__()) as pieces:
            async for _ in pieces:
                pass
        return self.completion

    def abort(self) -> None:
        """End the request; its reader gets a last piece with "abort" for each open choice.

        Called in the stream's event loop. A stream that has ended stays as it is.
        """
        self._is_aborted = True
        self._interrupt()

    async def aclose(self) -> None:
        """End the request if it runs; its reader gets nothing more."""
        self._is_left = True
        if self._step is not None:
            self._interrupt()
        else:
            await self._finish()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncGenerator[Piece, None]:
        # The generator is not kept here: a loop that is left drops it, which ends the request.
        if self._is_read:
            raise RuntimeError("A stream can be read once.")
        self._is_read = True
        return self._run()

    async def _run(self) -> AsyncGenerator[Piece, None]:
        self._owner.register(self)
        if self._patience.limit_s is not None:
            self._deadline = asyncio.get_running_loop().time() + self._patience.limit_s
        try:
            while (part := await self._next()) is not None:
                self._collector.add(part)
                if isinstance(part, Piece):
                    yield part
            for piece in self._collector.abort() if self._is_aborted else ():
                yield piece
        finally:
            await self._finish()

    async def _next(self) -> Generated | None:
        """The next part; None at the end, however it came."""
        if self._is_stopped:
            return None
        try:
            async with asyncio.timeout_at(self._deadline) as self._step:
                if self._parts is None:
                    return await self._begin()
                return await self._go_on(self._parts)
        except TimeoutError as error:
            if self._is_stopped:
                return None
            raise RequestTimeout(
                f"The answer took more than {self._patience.limit_s} s."
            ) from error
        finally:
            self._step = None

    async def _begin(self) -> Generated:
        """The first part; only until then is anything tried again."""
        async for attempt in attempts(self._retry):
            with attempt:
                parts = self._owner.open().generate(self._request, self._told_s)
                first = await anext(parts, None)
                if first is None:
                    raise ConnectionFailed("The stream ended before it began.")
                self._parts = parts
                return first
        raise AssertionError("the last attempt raises")

    async def _go_on(self, parts: AsyncGenerator[Generated, None]) -> Generated | None:
        try:
            return await anext(parts, None)
        except RequestTimeout:
            raise
        except ClientError as error:
            raise StreamBroken(error.message, facts=error.facts) from error

    @property
    def _is_stopped(self) -> bool:
        return self._is_left or self._is_aborted

    @property
    def _told_s(self) -> float | None:
        """What is left, if the server is to know."""
        if self._deadline is None or not self._patience.is_told:
            return None
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    def _interrupt(self) -> None:
        """Whoever waits for the next part waits no longer."""
        if self._step is not None and not self._step.expired():
            self._step.reschedule(asyncio.get_running_loop().time())

    async def _finish(self) -> None:
        self._owner.unregister(self)
        parts, self._parts = self._parts, None
        if parts is not None:
            self._is_left = True
            await parts.aclose()
