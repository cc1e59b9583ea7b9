"""A node's way to the board that the head keeps: it waits for the head, and tells when it goes."""

import errno
import itertools
import socket
import time
from collections.abc import Callable

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from shardline_server.board_keeper import BoardAnswer, Count, Put, Read, ToBoard
from shardline_server.engine_config import BoardAddress
from shardline_server.errors import ConfigError
from shardline_shards.channel import ClientKeys, Endpoint, Unreadable, connect, monitor, read

OTHER_SECRET = "the secrets of head and node differ; give both the same one"
_CONNECT_LIMIT_MS = 1000
_ANSWER_LIMIT_S = 10.0
# A head hangs up on who has other keys. So does one that dies; the next attempt tells them apart.
_HUNG_UP = (errno.EPIPE, errno.ECONNRESET)
_NUM_HANG_UPS = 2
_EVENTS = (
    zmq.Event.CLOSED
    | zmq.Event.DISCONNECTED
    | zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


class BoardClient:
    """One connection; requests are answered one by one, only a note may be long in coming."""

    def __init__(self, address: BoardAddress, keys: ClientKeys, deadline: float) -> None:
        """Wait for the head until `deadline` on the monotonic clock.

        Raises ConfigError: no head answers, or its keys come from another secret.
        """
        self._address = address
        self._decode: Callable[[bytes], BoardAnswer] = msgspec.msgpack.Decoder(BoardAnswer).decode
        self._numbers = itertools.count()
        self._answers: dict[int, bytes | int] = {}
        self._reads: dict[str, int] = {}
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_LIMIT_MS)
        self._events = monitor(self._socket, _EVENTS)
        connect(self._socket, Endpoint(address=f"tcp://{address}", keys=keys))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._events, zmq.POLLIN)
        try:
            self._find_head(deadline)
        except BaseException:
            self.close()
            raise

    def set(self, key: str, content: bytes) -> None:
        """Write a note. Raises ConfigError, like everything else here, if the head has gone."""
        self._ask(Put(next(self._numbers), key, content))

    def count(self, key: str) -> int:
        """Add one to a counter; returns the sum."""
        return int(self._ask(Count(next(self._numbers), key)))

    def is_there(self, key: str, within_s: float) -> bool:
        """Whether a note comes so soon."""
        if key not in self._reads:
            self._reads[key] = next(self._numbers)
            self._send(Read(self._reads[key], key))
        return self._is_answered(self._reads[key], within_s)

    def get(self, key: str) -> bytes:
        """A note that is there."""
        content = self._answers.pop(self._reads.pop(key))
        assert isinstance(content, bytes)
        return content

    def close(self) -> None:
        """Hang up."""
        self._socket.disable_monitor()
        self._events.close(linger=0)
        self._socket.close(linger=0)

    def _find_head(self, deadline: float) -> None:
        num_hang_ups = 0
        while num_hang_ups < _NUM_HANG_UPS:
            match self._next_event(deadline):
                case None:
                    raise ConfigError(f"no head answers at {self._address} ({self._why_not()})")
                case zmq.Event.HANDSHAKE_SUCCEEDED, _:
                    return
                case zmq.Event.HANDSHAKE_FAILED_AUTH, _:
                    break
                case zmq.Event.HANDSHAKE_FAILED_NO_DETAIL, reason if reason in _HUNG_UP:
                    num_hang_ups += 1
                case zmq.Event.CLOSED, _:  # nobody was there this time
                    num_hang_ups = 0
        raise ConfigError(OTHER_SECRET)

    def _next_event(self, deadline: float) -> tuple[int, int] | None:
        left_s = max(0.0, deadline - time.monotonic())
        if not self._events.poll(int(left_s * 1000)):
            return None
        event = recv_monitor_message(self._events)
        return event["event"], int(event["value"])

    def _why_not(self) -> str:
        """ZMQ does not tell."""
        where = (self._address.host, self._address.port)
        try:
            socket.create_connection(where, timeout=_CONNECT_LIMIT_MS / 1000).close()
        except OSError as error:
            return str(error)
        return "what listens there is none"

    def _ask(self, request: ToBoard) -> bytes | int:
        self._send(request)
        if not self._is_answered(request.number, _ANSWER_LIMIT_S):
            raise ConfigError(f"the head at {self._address} is silent for {_ANSWER_LIMIT_S:.0f} s")
        return self._answers.pop(request.number)

    def _send(self, request: ToBoard) -> None:
        self._socket.send(msgspec.msgpack.encode(request))

    def _is_answered(self, number: int, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while number not in self._answers:
            left_s = max(0.0, deadline - time.monotonic())
            ready = dict(self._poller.poll(int(left_s * 1000)))
            if not ready:
                return False
            self._take_in()
            if self._events in ready and number not in self._answers:
                raise ConfigError("the head has gone: its connection broke")
        return True

    def _take_in(self) -> None:
        while self._socket.poll(0):
            try:
                answer = read(self._decode, self._socket.recv_multipart())
            except Unreadable as error:
                raise ConfigError(
                    f"another version of Shardline keeps the board at {self._address}: {error}"
                ) from error
            self._answers[answer.number] = answer.content
