"""Head and nodes look after each other: each says every half second that it is there.

What a network cut would leave hanging for minutes is noticed here within seconds.
"""

import time

import msgspec
import zmq
from msgspec import Struct

SILENCE_LIMIT_S = 3.0
BEAT_INTERVAL_S = 0.5


class Beat(Struct, frozen=True, tag=True):
    """A node is there; `failure` says that one of its workers has ended, and how."""

    failure: str | None = None


class Answer(Struct, frozen=True, tag=True):
    """The head is there; with `leave` the node shall end its workers, and itself."""

    leave: bool = False


class NodeWatch:
    """The head's side. Nodes are known by the names that they joined with."""

    def __init__(self, host: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.bind(f"tcp://{host}:*")
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._heard: dict[str, float] = {}
        self._decode = msgspec.msgpack.Decoder(Beat).decode

    def expect(self, names: list[str]) -> None:
        """From now on these nodes must be heard."""
        self._heard = dict.fromkeys(names, time.monotonic())

    def find_failure(self) -> str | None:
        """Answer the beats that have come; what a node reports, or that one has fallen silent."""
        failure = None
        while self._socket.poll(0):
            identity, payload = self._socket.recv_multipart()
            beat = self._decode(payload)
            name = identity.decode()
            if name in self._heard:
                self._heard[name] = time.monotonic()
                self._send(name, Answer())
                failure = failure or (beat.failure and f"node {name}: {beat.failure}")
        return failure or self._find_silent()

    def dismiss(self) -> None:
        """Tell every node to leave."""
        for name in self._heard:
            self._send(name, Answer(leave=True))
        self._socket.close(linger=1000)

    def _find_silent(self) -> str | None:
        for name, heard in self._heard.items():
            silence_s = time.monotonic() - heard
            if silence_s > SILENCE_LIMIT_S:
                return f"node {name} has not been heard for {silence_s:.1f} s"
        return None

    def _send(self, name: str, answer: Answer) -> None:
        self._socket.send_multipart([name.encode(), msgspec.msgpack.encode(answer)])


class HeadWatch:
    """A node's side."""

    def __init__(self, address: str, name: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.connect(address)
        self._decode = msgspec.msgpack.Decoder(Answer).decode
        self._heard = time.monotonic()

    @property
    def silence_s(self) -> float:
        """For how long the head has not been heard."""
        return time.monotonic() - self._heard

    def beat(self, failure: str | None) -> bool:
        """Say that we are there and wait out the interval; True if the head tells us to leave."""
        self._socket.send(msgspec.msgpack.encode(Beat(failure)))
        end = time.monotonic() + BEAT_INTERVAL_S
        while self._socket.poll(max(0, int((end - time.monotonic()) * 1000))):
            self._heard = time.monotonic()
            if self._decode(self._socket.recv()).leave:
                return True
        return False

    def close(self) -> None:
        """Send what is queued, for a second at most."""
        self._socket.close(linger=1000)
