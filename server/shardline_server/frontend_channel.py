"""The engine's end of the channel to its front ends, and the names that they give to requests."""

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from shardline_server.messages import FromEngine, ToEngine
from shardline_shards.gate import Gate, Listener


class FrontendChannel:
    """The engine's end of the channel to its front ends."""

    def __init__(self, gate: Gate, host: str) -> None:
        decode: Callable[[bytes], ToEngine] = msgspec.msgpack.Decoder(ToEngine).decode
        self._listener = Listener(gate, host, decode)
        self.socket = self._listener.socket
        self.address = self._listener.endpoint.address
        self.frontends: set[bytes] = set()
        self._encode = msgspec.msgpack.Encoder().encode

    def receive(self) -> tuple[bytes, ToEngine] | None:
        """The next message and who sent it, if one is there."""
        received = self._listener.receive()
        if received is not None:
            self.frontends.add(received[0])
        return received

    @property
    def has_message(self) -> bool:
        """Whether somebody has said something that is not received yet."""
        return bool(self.socket.poll(0))

    @property
    def num_dropped(self) -> int:
        """Messages that could not be read, and strangers."""
        return self._listener.num_dropped

    def send(self, frontend: bytes, message: FromEngine) -> None:
        """Queue a message for a front end."""
        self._listener.send(frontend, self._encode(message))

    def send_all(self, message: FromEngine) -> None:
        """Queue a message for every front end."""
        for frontend in self.frontends:
            self.send(frontend, message)

    def close(self) -> None:
        """Send what is queued, for a second at most, then leave."""
        self._listener.close(linger_ms=1000)


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
