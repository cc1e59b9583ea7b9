"""A worker's end of the control channel: a wire to an engine on this node, else ZMQ."""

import logging
import socket
from collections.abc import Sequence
from typing import Any, Protocol
from zlib import crc32

import zmq

from shardline_shards.channel import Endpoint, Unreadable, connect, read
from shardline_shards.messages import (
    Dropped,
    FromWorker,
    Stop,
    ToWorker,
    WorkerConfig,
    decode_to_worker,
    encode,
    worker_name,
)
from shardline_shards.wire import Wire

logger = logging.getLogger("shardline.worker")


class _Line(Protocol):
    """What carries bytes to the engine and back; `source` is what to poll on."""

    source: Any

    @property
    def has_read_message(self) -> bool:
        """Whether one was read already, so that `source` does not tell of it."""
        ...

    def send(self, payload: bytes) -> None:
        """Pass on a message, or queue it."""
        ...

    def receive(self) -> Sequence[bytes]:
        """Wait for the next message's frames. Raises EOFError if none can come any more."""
        ...

    def close(self) -> None:
        """Send what is queued, then leave."""
        ...


class _SocketLine:
    """To an engine on any node, which listens."""

    has_read_message = False

    def __init__(self, engine: Endpoint, name: bytes) -> None:
        self.source: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.source.setsockopt(zmq.IDENTITY, name)
        self.source.setsockopt(zmq.LINGER, 1000)
        connect(self.source, engine)

    def send(self, payload: bytes) -> None:
        self.source.send(payload)

    def receive(self) -> Sequence[bytes]:
        return self.source.recv_multipart()

    def close(self) -> None:
        self.source.close()


class _WireLine:
    """To the engine that has started this process."""

    def __init__(self, descriptor: int) -> None:
        self.source = descriptor
        self._wire = Wire(socket.socket(fileno=descriptor))

    @property
    def has_read_message(self) -> bool:
        return self._wire.has_read_message

    def send(self, payload: bytes) -> None:
        self._wire.send(payload)
        self._wire.wait_sent()

    def receive(self) -> Sequence[bytes]:
        return [self._wire.wait_received()]

    def close(self) -> None:
        self._wire.close()


class EngineChannel:
    """Where the engine's messages come, and the worker's leave."""

    def __init__(self, config: WorkerConfig) -> None:
        self._line: _Line
        if config.wire is not None:
            self._line = _WireLine(config.wire)
        else:
            rank = config.layout.rank(config.place)
            self._line = _SocketLine(config.engine, worker_name(rank, config.generation))
        self.checksum = 0

    def send(self, message: FromWorker) -> None:
        """Queue a message for the engine."""
        self._line.send(encode(message))

    def has_message(self, within_ms: int | None, or_else: zmq.Socket[Any] | None) -> bool:
        """Wait until the engine has said something; False if that time has passed before, or the
        other socket has become readable.
        """
        if self._line.has_read_message:
            return True
        sources = [self._line.source] if or_else is None else [self._line.source, or_else]
        ready, _, _ = zmq.select(sources, [], [], None if within_ms is None else within_ms / 1000)
        return self._line.source in ready

    def receive(self) -> ToWorker:
        """Wait for the engine's next message; `checksum` is of its bytes, the same to all ranks.

        What cannot be read is dropped, and the engine told so. An engine that is gone has nothing
        more for us to do.
        """
        while True:
            try:
                frames = self._line.receive()
            except EOFError:
                return Stop()
            try:
                message = read(decode_to_worker, frames)
            except Unreadable as error:
                logger.warning("dropped what the engine sent: %s", error)
                self.send(Dropped("worker", 1))
                continue
            self.checksum = crc32(frames[0])
            return message

    def close(self) -> None:
        """Send what is queued, then leave."""
        self._line.close()
        zmq.Context.instance().term()
