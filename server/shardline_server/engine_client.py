"""The front end's end of the wire to the engine: requests out, Deltas in. Token ids only.

A slow reader holds up nobody: each group of requests has its own queue, and a reader that is too
far behind is ended alone.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from types import TracebackType

import msgspec

from shardline_server.engine_line import open_line
from shardline_server.errors import EngineUnavailable, NotServing, ReaderTooSlow, ShardlineError
from shardline_server.messages import (
    Abort,
    Delta,
    Drain,
    Drops,
    EngineAskedToLeave,
    EngineFailed,
    EngineReady,
    EngineRecovering,
    EngineStats,
    FinishReason,
    FromEngine,
    Hello,
    Output,
    PipeStats,
    Refusal,
    Submit,
    ToEngine,
)
from shardline_shards.channel import Endpoint, Unreadable, read
from shardline_shards.wire import Wire

logger = logging.getLogger("shardline.frontend")


class DeltaStream:
    """The Deltas of a group of requests, in the order they come, until each has ended.

    Leaving the `with` block aborts in the engine what has not ended.
    """

    def __init__(
        self,
        request_ids: Sequence[str],
        abort: Callable[[Sequence[str]], None],
        *,
        max_unread: int,
    ) -> None:
        """`max_unread` Deltas of each request may wait for the reader."""
        self._open = set(request_ids)
        self._num_tokens = dict.fromkeys(request_ids, 0)
        self._abort_in_engine = abort
        self._queue: asyncio.Queue[Delta] = asyncio.Queue()
        self._max_unread = max_unread * len(request_ids)

    def __enter__(self) -> "DeltaStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(list(self._open))

    def __aiter__(self) -> "DeltaStream":
        return self

    async def __anext__(self) -> Delta:
        while True:
            if not self._open and self._queue.empty():
                raise StopAsyncIteration
            delta = await self._queue.get()
            if delta.request_id in self._open:
                break
        if delta.finish_reason is not None:
            self._open.remove(delta.request_id)
        return delta

    def put(self, delta: Delta) -> None:
        """Called by the reader of the wire."""
        self._num_tokens[delta.request_id] = delta.index + len(delta.token_ids)
        self._queue.put_nowait(delta)
        if self._queue.qsize() > self._max_unread:
            self._end_for_lack_of_reading()

    def _end_for_lack_of_reading(self) -> None:
        self._abort_in_engine(list(self._open))
        while not self._queue.empty():
            self._queue.get_nowait()
        error = ReaderTooSlow(f"{self._max_unread} pieces were left unread; the request was ended.")
        for request_id in self._open:
            self._queue.put_nowait(failure_delta(request_id, error))

    def close(self, request_ids: Sequence[str]) -> None:
        """The reader wants no more of these: they are aborted, and nothing more comes for them."""
        self._abort_in_engine(
            [request_id for request_id in request_ids if request_id in self._open]
        )
        self._open.difference_update(request_ids)

    def abort(self) -> None:
        """End what has not ended, with the terminal record "abort" for the reader."""
        self._abort_in_engine(list(self._open))
        for request_id in self._open:
            index = self._num_tokens[request_id]
            self.put(terminal_delta(request_id, FinishReason.ABORT, index))


class EngineClient:
    """One connection to one engine, with any number of open requests."""

    def __init__(self, engine: Endpoint | Wire, *, max_unread_pieces: int) -> None:
        self._engine = engine
        self._max_unread = max_unread_pieces
        self._streams: dict[str, DeltaStream] = {}
        self._decode: Callable[[bytes], FromEngine] = msgspec.msgpack.Decoder(FromEngine).decode
        self._answered = asyncio.Event()
        self._failed = asyncio.Event()
        self._changed = asyncio.Event()
        self._asked_to_leave = asyncio.Event()
        self._leave_reason = ""
        self.ready: EngineReady | None = None
        self.is_recovering = False
        self.last_loss: str | None = None
        self.num_losses = 0
        self.failure: str | None = None
        self.stats: EngineStats | None = None
        self.pipe: PipeStats | None = None
        self._drops = Drops({})
        self._num_dropped = 0

    @property
    def is_healthy(self) -> bool:
        """False once the engine has failed; `failure` says why. True while it still loads."""
        return self.failure is None

    @property
    def is_serving(self) -> bool:
        """Whether the engine takes requests now."""
        return self.is_healthy and self.ready is not None and not self.is_recovering

    @property
    def drops(self) -> dict[str, int]:
        """What either side of an internal channel has dropped, by channel."""
        channels = self._drops.by_channel
        return channels | {"frontend": channels.get("frontend", 0) + self._num_dropped}

    @property
    def num_open_requests(self) -> int:
        """Requests of this front end that have not ended."""
        return len(self._streams)

    async def start(self) -> None:
        """Connect (the engine need not be there yet) and introduce ourselves."""
        self._connect()

    async def stop(self) -> None:
        """Disconnect; open streams end with an error."""
        self.fail("the server is shutting down", retry_after_s=NotServing.retry_after_s)
        self._line.close()

    def lose(self, reason: str) -> None:
        """The engine is gone and another one is coming: open streams end with an error, new
        requests are refused until `reconnect` and the new engine's greeting.
        """
        self._note_loss(reason)
        message = f"The engine was lost and is being replaced: {reason}. Send the request again."
        self._end_streams(message, NotServing.retry_after_s)

    def reconnect(self, engine: Endpoint | Wire) -> None:
        """To the engine that has taken the place of a lost one."""
        self._line.close()
        self._engine = engine
        self._connect()

    def drain(self, grace_s: float) -> None:
        """The server leaves in `grace_s`: what will not be done by then is ended at once."""
        self._send(Drain(grace_s))

    def _connect(self) -> None:
        self._line = open_line(self._engine, self._read)
        self._send(Hello())

    async def wait_ready(self) -> EngineReady:
        """Until the engine can serve; raises EngineUnavailable if it failed instead."""
        await self._answered.wait()
        return self.require_ready()

    async def wait_changed(self) -> None:
        """Until `is_serving` may have changed."""
        await self._changed.wait()
        self._changed.clear()

    async def wait_asked_to_leave(self) -> str:
        """Until the engine asks us to leave, having let requests finish; returns why."""
        await self._asked_to_leave.wait()
        return self._leave_reason

    async def wait_failed(self) -> str:
        """Until the engine has failed; returns the reason."""
        await self._failed.wait()
        assert self.failure is not None
        return self.failure

    def require_healthy(self) -> None:
        """Raises EngineUnavailable once the engine has failed; fine while it still loads."""
        if self.failure is not None:
            raise EngineUnavailable(f"Cannot serve: {self.failure}")

    def require_ready(self) -> EngineReady:
        """What the engine said about itself; raises EngineUnavailable when it cannot serve."""
        self.require_healthy()
        if self.ready is None:
            raise NotServing("The model is still loading; try again in a moment.")
        if self.is_recovering:
            raise NotServing(
                "A part of the server was lost and is being replaced; running requests go on after "
                f"a pause, new ones are taken again in a moment ({self.last_loss})."
            )
        return self.ready

    def submit(self, requests: Sequence[Submit]) -> DeltaStream:
        """Send requests; their Deltas come in the returned stream. Raises EngineUnavailable."""
        self.require_ready()
        stream = DeltaStream(
            [request.request_id for request in requests],
            self._abort_in_engine,
            max_unread=self._max_unread,
        )
        for request in requests:
            assert request.request_id not in self._streams, request.request_id
            self._streams[request.request_id] = stream
            self._send(request)
        return stream

    def fail(self, reason: str, retry_after_s: float | None = None) -> None:
        """The engine is gone: every open stream ends with an error. The first reason is kept."""
        if self.failure is None:
            self.failure = reason
        self._end_streams(f"Cannot serve: {self.failure}", retry_after_s)
        self._answered.set()
        self._failed.set()
        self._changed.set()

    def _end_streams(self, message: str, retry_after_s: float | None) -> None:
        error = EngineUnavailable(message, refusal=Refusal(retry_after_s=retry_after_s))
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            stream.put(failure_delta(request_id, error))

    def _note_loss(self, reason: str) -> None:
        self.is_recovering = True
        self.last_loss = reason
        self.num_losses += 1
        self._changed.set()

    def _abort_in_engine(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if self._streams.pop(request_id, None) is not None:
                self._send(Abort(request_id))

    def _send(self, message: ToEngine) -> None:
        self._line.send(msgspec.msgpack.encode(message))

    def _read(self) -> None:
        """All that is there."""
        while (frames := self._line.receive()) is not None:
            try:
                message = read(self._decode, frames)
            except Unreadable as error:
                self._drop(str(error))
                continue
            try:
                self._receive(message)
            except Exception as error:
                logger.exception("Cannot go on with what the engine sent")
                self.fail(f"it sent a message that makes no sense ({error})")

    def _drop(self, reason: str) -> None:
        """Whose answer a message was part of cannot be known: no open stream can be whole now."""
        logger.error("dropped what the engine sent, and ended all requests: %s", reason)
        self._num_dropped += 1
        request_ids = list(self._streams)
        self._end_streams(
            "A part of the answer was lost inside the server. Send the request again.",
            NotServing.retry_after_s,
        )
        for request_id in request_ids:
            self._send(Abort(request_id))

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Output():
                self.stats = message.stats
                for delta in message.deltas:
                    self._route(delta)
            case PipeStats():
                self.pipe = message
            case Drops():
                self._drops = message
            case EngineReady():
                self.ready = message
                self.is_recovering = False
                self._answered.set()
                self._changed.set()
            case EngineRecovering():
                self._note_loss(message.reason)
            case EngineAskedToLeave():
                self._leave_reason = message.reason
                self._asked_to_leave.set()
            case EngineFailed():
                self.fail(message.reason)

    def _route(self, delta: Delta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return  # aborted while this was on its way
        if delta.finish_reason is not None:
            del self._streams[delta.request_id]
        stream.put(delta)


def terminal_delta(request_id: str, reason: FinishReason, index: int) -> Delta:
    """A terminal record that the front end writes itself, after `index` output tokens."""
    return Delta(
        request_id=request_id,
        index=index,
        token_ids=[],
        logprobs=[],
        prompt_logprobs=[],
        finish_reason=reason,
        error_code=None,
        error_message=None,
        num_cached_tokens=0,
    )


def failure_delta(request_id: str, error: ShardlineError) -> Delta:
    """The same for an error, which `generation.error_of` turns into an exception again; that ends
    all choices, however many tokens they had.
    """
    return msgspec.structs.replace(
        terminal_delta(request_id, FinishReason.ERROR, index=0),
        error_code=type(error).__name__,
        error_message=error.message,
        refusal=Refusal(retry_after_s=error.retry_after_s),
    )
