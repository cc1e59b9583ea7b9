"""The board that a head keeps itself: notes and counters, for whoever holds the launch's secret.

Everything of it goes over one of our channels, so nobody else can read, write or delete a thing.
"""

import os
import socket
from collections import defaultdict
from collections.abc import Callable
from threading import Thread

import msgspec
import zmq
from msgspec import Struct

from shardline_shards.gate import Gate, LaunchKeys, Listener

_LINGER_MS = 1000


class Put(Struct, frozen=True, tag=True):
    """Write a note; the answer is empty. Like all requests, it has a `number` of its sender's."""

    number: int
    key: str
    content: bytes


class Read(Struct, frozen=True, tag=True):
    """Read a note; the answer comes when it is there."""

    number: int
    key: str


class Count(Struct, frozen=True, tag=True):
    """Add one to a counter; the answer is the sum."""

    number: int
    key: str


ToBoard = Put | Read | Count


class BoardAnswer(Struct, frozen=True, tag=True):
    """To the request of that number."""

    number: int
    content: bytes | int


class BoardKeeper:
    """A thread that answers at one address, until it is closed."""

    def __init__(self, keys: LaunchKeys, host: str, port: int) -> None:
        """Raises OSError if that port is taken, or the address is not this node's."""
        decode: Callable[[bytes], ToBoard] = msgspec.msgpack.Decoder(ToBoard).decode
        self._gate = Gate(keys)
        try:
            self._listener = Listener(self._gate, host, decode, port)
        except zmq.ZMQError as error:
            self._gate.close()
            assert error.errno is not None
            raise OSError(error.errno, os.strerror(error.errno)) from error
        self.endpoint = self._listener.endpoint
        self.num_dropped = 0
        self._notes: dict[str, bytes] = {}
        self._sums: dict[str, int] = defaultdict(int)
        self._waiting: dict[str, list[tuple[bytes, int]]] = defaultdict(list)
        self._end, self._closer = socket.socketpair()
        self._thread = Thread(target=self._run, name="board", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Say what is still to be said, for a second at most, and free the port."""
        self._closer.close()
        self._thread.join()
        self._gate.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._listener.socket, self._listener.connections, self._end):
            poller.register(source, zmq.POLLIN)
        while self._end.fileno() not in dict(poller.poll()):
            while (received := self._listener.receive()) is not None:
                self._serve(*received)
            self.num_dropped = self._listener.num_dropped
        self._end.close()
        self._listener.close(_LINGER_MS)

    def _serve(self, sender: bytes, request: ToBoard) -> None:
        key = request.key
        match request:
            case Put(number):
                self._notes[key] = request.content
                self._answer(sender, number, b"")
                for reader in self._waiting.pop(key, []):
                    self._answer(*reader, request.content)
            case Read(number) if key in self._notes:
                self._answer(sender, number, self._notes[key])
            case Read(number):
                self._waiting[key].append((sender, number))
            case Count(number):
                self._sums[key] += 1
                self._answer(sender, number, self._sums[key])

    def _answer(self, receiver: bytes, number: int, content: bytes | int) -> None:
        self._listener.send(receiver, msgspec.msgpack.encode(BoardAnswer(number, content)))
