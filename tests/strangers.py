"""Who comes to our internal channels: with the right keys, with wrong ones, with none at all."""

import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from shardline_shards.channel import ClientKeys, Endpoint, connect
from shardline_shards.gate import LaunchKeys, Listener

WAIT_MS = 30_000
# What somebody may send who has found a port and knows nothing else.
RAW_BYTES = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 100,
    "a greeting without keys": b"\xff" + b"\0" * 8 + b"\x7f\x03\x00NULL" + b"\0" * 48 + b"\x04\x05",
    "random": random.Random(6).randbytes(1000),
}
# Keys that are not the launch's, made from those that are.
WRONG_KEYS: dict[str, Callable[[ClientKeys], ClientKeys | None]] = {
    "no keys": lambda right: None,
    "keys of another launch": lambda right: LaunchKeys.create().client,
    "the server's key and an own pair": lambda right: msgspec.structs.replace(
        LaunchKeys.create().client, server_public=right.server_public
    ),
}
_TURNED_AWAY = (
    zmq.Event.DISCONNECTED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


def knock(address: str, payload: bytes) -> None:
    """Send bytes as they are to `tcp://HOST:PORT`, and wait until the other side hangs up."""
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), timeout=WAIT_MS / 1000) as connection,
        suppress(ConnectionError),  # with bytes of ours that nobody read
    ):
        connection.sendall(payload)
        with suppress(OSError):  # it has hung up already
            connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass


@contextmanager
def dealer(address: str, keys: ClientKeys | None, name: bytes) -> Iterator[zmq.Socket[bytes]]:
    """A peer of that name with those keys."""
    context = zmq.Context()
    own = context.socket(zmq.DEALER)
    own.identity = name
    try:
        if keys is None:
            own.connect(address)
        else:
            connect(own, Endpoint(address=address, keys=keys))
        yield own
    finally:
        context.destroy(linger=0)


def wait_until_turned_away(own: zmq.Socket[bytes]) -> None:
    """Of a dealer: until its connection has failed once."""
    events = own.get_monitor_socket(_TURNED_AWAY)
    assert events.poll(WAIT_MS)
    recv_monitor_message(events)


def wait_for_drops(listener: Listener, count: int) -> None:
    """Until so many have been counted, else the test's time limit."""
    while listener.num_dropped < count:
        listener.socket.poll(10)
