"""How a front end reaches its engine: a wire to the one that it has started, ZMQ to any other."""

import asyncio
from collections.abc import Callable
from typing import Protocol

import zmq

from shardline_shards.channel import Endpoint, connect
from shardline_shards.wire import Wire


class EngineLine(Protocol):
    """One connection, in the event loop that it is made in; nothing of it ever waits."""

    def send(self, payload: bytes) -> None:
        """Queue a message."""

    def receive(self) -> list[bytes] | None:
        """The frames of the next message, if one is there and the line not closed."""

    def close(self) -> None:
        """Leave, once or again; what is queued is lost."""


def open_line(engine: Endpoint | Wire, on_readable: Callable[[], None]) -> EngineLine:
    """`on_readable` is called when there may be something to receive; then all has to be."""
    if isinstance(engine, Wire):
        return WireLine(engine, on_readable)
    return ZmqLine(engine, on_readable)


class ZmqLine:
    """ZMQ's own asyncio sockets take a future, a poll and a task for each message; this one is read
    by the loop.
    """

    def __init__(self, engine: Endpoint, on_readable: Callable[[], None]) -> None:
        self._on_readable = on_readable
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)  # so that sending never waits
        connect(self._socket, engine)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), on_readable)

    def send(self, payload: bytes) -> None:
        """Queue a message."""
        self._socket.send(payload)
        # ZMQ's descriptor tells once that something has happened, and this may have been told it.
        asyncio.get_running_loop().call_soon(self._on_readable)

    def receive(self) -> list[bytes] | None:
        """The frames of the next message, if one is there and the line not closed."""
        if self._socket.closed:
            return None
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def close(self) -> None:
        """Leave."""
        if not self._socket.closed:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._context.destroy(linger=0)


class WireLine:
    """Without threads and encryption between, which a process and its child do not need."""

    def __init__(self, engine: Wire, on_readable: Callable[[], None]) -> None:
        self._wire: Wire | None = engine
        asyncio.get_running_loop().add_reader(engine.fileno(), on_readable)

    def send(self, payload: bytes) -> None:
        """Queue a message; lost if the engine is gone, which whoever watches it will tell."""
        if self._wire is not None and not self._wire.send(payload):
            asyncio.get_running_loop().add_writer(self._wire.fileno(), self._flush)

    def _flush(self) -> None:
        assert self._wire is not None
        if self._wire.flush():
            asyncio.get_running_loop().remove_writer(self._wire.fileno())

    def receive(self) -> list[bytes] | None:
        """The frames of the next message, if one is there and the line not closed."""
        if self._wire is None:
            return None
        try:
            message = self._wire.receive()
        except EOFError:  # Its descriptor would be readable for ever.
            self.close()
            return None
        return None if message is None else [message]

    def close(self) -> None:
        """Leave."""
        if self._wire is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._wire.fileno())
            loop.remove_writer(self._wire.fileno())
            self._wire.close()
            self._wire = None
