"""ZMQ channels between our own processes: encrypted, and open to nobody without the launch's keys.

CURVE (ZMTP 3.1, RFC 26) does it. The side that binds has one pair of keys; all that connect share
another, and know the first one's public key. Here is the side that connects.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import zmq
from msgspec import Struct

_Message = TypeVar("_Message")
_monitor_numbers = itertools.count()


class ClientKeys(Struct, frozen=True, kw_only=True):
    """What a process needs to be let in; all three are secrets of the launch, in Z85."""

    server_public: str
    public: str
    secret: str

    def __repr__(self) -> str:
        return "ClientKeys(…)"  # so that no log ever shows them


class Endpoint(Struct, frozen=True, kw_only=True):
    """Where one of our own processes listens, and what opens it."""

    address: str
    keys: ClientKeys


class Unreadable(ValueError):
    """Bytes that are no message; says why, and nothing of what is in them."""


def connect(socket: zmq.Socket[Any], endpoint: Endpoint) -> None:
    """Connect an own socket; with wrong keys it will neither hear nor be heard."""
    keys = endpoint.keys
    socket.curve_serverkey = keys.server_public.encode()
    socket.curve_publickey = keys.public.encode()
    socket.curve_secretkey = keys.secret.encode()
    socket.connect(endpoint.address)


def monitor(socket: zmq.Socket[Any], events: int) -> zmq.Socket[Any]:
    """Where to hear what becomes of a socket's connections; whoever asks closes it."""
    address = f"inproc://events/{next(_monitor_numbers)}"  # one that was used is not free at once
    socket.monitor(address, events)
    heard: zmq.Socket[Any] = socket.context.socket(zmq.PAIR)
    heard.set_hwm(0)  # else ZMQ's own thread would wait until somebody asks
    heard.connect(address)
    return heard


def read(decode: Callable[[bytes], _Message], frames: Sequence[bytes]) -> _Message:
    """The message that is these frames, sender left out. Raises Unreadable."""
    if len(frames) != 1:
        raise Unreadable(f"{len(frames)} frames where one was expected")
    try:
        return decode(frames[0])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        reason = f"{len(frames[0])} bytes that are no message ({type(error).__name__})"
        raise Unreadable(reason) from error
