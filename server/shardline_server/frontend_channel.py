"""The engine's end of the channel to its front ends, and the names that they give to requests."""

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from shardline_server.messages import FromEngine, ToEngine
from shardline_server.wires import Wires
from shardline_shards.gate import Gate, Listener
from shardline_shards.wire import Wire

logger = logging.getLogger("shardline.engine")

_LAST_WORDS_TAKE_S = 1.0
# What the engine calls the front end that has started it; ZMQ's own names are random bytes.
PARENT = b"parent"


class FrontendChannel:
    """The engine's end of the channel to its front ends: on a wire the one that has started it, on
    one socket whoever else has the keys.
    """

    def __init__(self, gate: Gate, host: str, wire: int | None) -> None:
        decode: Callable[[bytes], ToEngine] = msgspec.msgpack.Decoder(ToEngine).decode
        self._listener = Listener(gate, host, decode)
        self._wires = Wires(decode)
        if wire is not None:
            self._wires.add(PARENT, Wire(socket.socket(fileno=wire)))
        self.sources: list[Any] = [self._wires.fileno(), self._listener.socket]
        self.address = self._listener.endpoint.address
        self.frontends: set[bytes] = set()
        self._num_impostures = 0
        self._encode = msgspec.msgpack.Encoder().encode

    def receive(self) -> tuple[bytes, ToEngine] | None:
        """The next message and who sent it, if one is there."""
        received = self._wires.receive() or self._receive_from_others()
        if received is not None:
            self.frontends.add(received[0])
        return received

    def _receive_from_others(self) -> tuple[bytes, ToEngine] | None:
        while (received := self._listener.receive()) is not None:
            if received[0] != PARENT:
                return received
            self._num_impostures += 1
            logger.warning("dropped what somebody said in the name of our own front end")
        return None

    def wait(self) -> None:
        """Until somebody says something."""
        if not self.has_unread:
            zmq.select(self.sources, [], [])

    @property
    def has_unread(self) -> bool:
        """Whether there is something to receive that `sources` do not know of any more."""
        return self._wires.has_unread

    @property
    def has_message(self) -> bool:
        """Whether somebody has said something that is not received yet."""
        return self._wires.has_message or bool(self._listener.socket.poll(0))

    @property
    def num_dropped(self) -> int:
        """Messages that could not be read, or came in a wrong name, and strangers."""
        return self._listener.num_dropped + self._wires.num_dropped + self._num_impostures

    def send(self, frontend: bytes, message: FromEngine) -> None:
        """Queue a message for a front end."""
        payload = self._encode(message)
        if not self._wires.send(frontend, payload):
            self._listener.send(frontend, payload)

    def send_all(self, message: FromEngine) -> None:
        """Queue a message for every front end."""
        for frontend in self.frontends:
            self.send(frontend, message)

    def close(self) -> None:
        """Send what is queued, for a second at most, then leave."""
        self._wires.flush(_LAST_WORDS_TAKE_S)
        self._wires.close()
        self._listener.close(linger_ms=round(_LAST_WORDS_TAKE_S * 1000))


@dataclass(slots=True)
class RequestNames:
    """Scheduler ids and the names that front ends use; two front ends may use the same."""

    _clients: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    @staticmethod
    def scheduler_id(frontend: bytes, request_id: str) -> str:
        """The engine-wide name."""
        return f"{frontend.hex()}/{request_id}"

    def add(self, frontend: bytes, request_id: str) -> str:
        """Remember who sent a request."""
        name = self.scheduler_id(frontend, request_id)
        self._clients[name] = (frontend, request_id)
        return name

    def __getitem__(self, name: str) -> tuple[bytes, str]:
        return self._clients[name]

    def forget(self, name: str) -> None:
        """The request is over."""
        self._clients.pop(name, None)
