"""The engine's ends of the wires to this node's workers, and to the front end beside it."""

import logging
import select
import selectors
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from shardline_shards.channel import Unreadable, read
from shardline_shards.wire import Wire

logger = logging.getLogger("shardline.engine")

_Message = TypeVar("_Message")


class Wires(Generic[_Message]):
    """Wires by the name of who is at the other end.

    Never waits for anybody: what an end has no room for is kept, and passed on when it has. What
    cannot be read is dropped and counted.
    """

    def __init__(self, decode: Callable[[bytes], _Message]) -> None:
        self._decode = decode
        self._selector = selectors.DefaultSelector()
        self._wires: dict[bytes, Wire] = {}
        self._received: deque[tuple[bytes, _Message]] = deque()
        self.num_dropped = 0

    def fileno(self) -> int:
        """A descriptor that is readable while any wire has something to do."""
        # Of epoll or kqueue, one of which every system that we run on has.
        return self._selector.fileno()

    def add(self, name: bytes, wire: Wire) -> None:
        """From now on hear this one too; it is closed when its other end is gone."""
        self._wires[name] = wire
        self._selector.register(wire, selectors.EVENT_READ, name)

    def __contains__(self, name: bytes) -> bool:
        return name in self._wires

    def send(self, name: bytes, message: bytes) -> bool:
        """Queue a message; False if nobody of that name is on a wire."""
        wire = self._wires.get(name)
        if wire is None:
            return False
        if not wire.send(message):
            self._watch(wire, name, selectors.EVENT_READ | selectors.EVENT_WRITE)
        return True

    @property
    def has_unread(self) -> bool:
        """Whether messages are here already, come together with others, that were not received."""
        return bool(self._received)

    @property
    def has_message(self) -> bool:
        """Whether there may be one to receive."""
        return bool(self._received or self._selector.select(0))

    def receive(self) -> tuple[bytes, _Message] | None:
        """The next message and who sent it, if one is there."""
        if not self._received:
            for key, events in self._selector.select(0):
                self._serve(key.data, events)
        return self._received.popleft() if self._received else None

    def flush(self, patience_s: float) -> None:
        """Wait so long at most until everybody has room for what is queued."""
        until = time.monotonic() + patience_s
        while full := [wire for wire in self._wires.values() if not wire.flush()]:
            _, writable, _ = select.select([], full, [], max(0.0, until - time.monotonic()))
            if not writable:
                return

    def close(self) -> None:
        """Leave all."""
        for name in list(self._wires):
            self._drop(name)
        self._selector.close()

    def _serve(self, name: bytes, events: int) -> None:
        wire = self._wires[name]
        if events & selectors.EVENT_WRITE and wire.flush():
            self._watch(wire, name, selectors.EVENT_READ)
        if events & selectors.EVENT_READ:
            self._read(name, wire)

    def _read(self, name: bytes, wire: Wire) -> None:
        """What one look at it gives; if there is more, the descriptor stays readable."""
        try:
            frame = wire.receive()
            while frame is not None:
                self._take(name, frame)
                frame = wire.receive() if wire.has_read_message else None
        except EOFError:
            self._drop(name)

    def _take(self, name: bytes, frame: bytes) -> None:
        try:
            self._received.append((name, read(self._decode, [frame])))
        except Unreadable as error:
            self.num_dropped += 1
            logger.warning("dropped what %r sent: %s", name, error)

    def _watch(self, wire: Wire, name: bytes, events: int) -> None:
        self._selector.modify(wire, events, name)

    def _drop(self, name: bytes) -> None:
        wire = self._wires.pop(name)
        self._selector.unregister(wire)
        wire.close()
