"""The side of our channels that binds: who has the launch's keys comes in, nobody else does.

The keys come in the configuration that a process reads from its standard input, and reach other
nodes in sealed notes (`rendezvous.py`), on a board whose own keys follow from the launch's secret.
"""

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

import zmq
from msgspec import Struct
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from shardline_shards.channel import ClientKeys, Endpoint, Unreadable, read
from shardline_shards.strangers import StrangerCount

logger = logging.getLogger("shardline.gate")

_Message = TypeVar("_Message")


class LaunchKeys(Struct, frozen=True, kw_only=True):
    """The keys of one launch; `server_secret` only for the process that listens."""

    server_secret: str
    client: ClientKeys

    @classmethod
    def create(cls) -> "LaunchKeys":
        """New ones."""
        server_public, server_secret = _key_pair()
        public, secret = _key_pair()
        client = ClientKeys(server_public=server_public, public=public, secret=secret)
        return cls(server_secret=server_secret, client=client)

    @classmethod
    def of(cls, server_secret: bytes, client_secret: bytes) -> "LaunchKeys":
        """Those that follow from two secrets of 32 bytes."""
        server, own = z85.encode(server_secret), z85.encode(client_secret)
        client = ClientKeys(
            server_public=zmq.curve_public(server).decode(),
            public=zmq.curve_public(own).decode(),
            secret=own.decode(),
        )
        return cls(server_secret=server.decode(), client=client)

    @classmethod
    def among_clients(cls, keys: ClientKeys) -> "LaunchKeys":
        """Those by which processes that share `keys` let each other in, and nobody else."""
        own = ClientKeys(server_public=keys.public, public=keys.public, secret=keys.secret)
        return cls(server_secret=keys.secret, client=own)

    def __repr__(self) -> str:
        return "LaunchKeys(…)"


def _key_pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


class Gate:
    """A ZMQ context with one who tells who may come in; for all listeners of a process."""

    def __init__(self, keys: LaunchKeys) -> None:
        self.keys = keys
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = ThreadAuthenticator(self.context, log=_quiet_log())
        self._authenticator.configure_curve_callback("*", _OnlyKey(keys.client.public))
        self._authenticator.start()

    def close(self) -> None:
        """After all listeners: wait for what they have queued, for as long as each lingers."""
        self._authenticator.stop()
        self.context.term()


class _OnlyKey:
    """What the authenticator asks; a peer has proven by then that it holds the key's secret."""

    def __init__(self, public: str) -> None:
        self._public = public.encode()

    def callback(self, _domain: str, key: bytes) -> bool:
        return key == self._public


def _quiet_log() -> logging.Logger:
    """The authenticator writes keys at debug level."""
    log = logging.getLogger("shardline.gate.zap")
    log.setLevel(logging.ERROR)
    return log


class Listener(Generic[_Message]):
    """A ROUTER at one address of this node, on a port that the system chooses, or on a given one.

    What cannot be read is dropped and counted, and so are the connections of strangers.
    """

    def __init__(
        self, gate: Gate, host: str, decode: Callable[[bytes], _Message], port: int | None = None
    ) -> None:
        """Raises ZMQError if it cannot listen there."""
        self._decode = decode
        self._num_unreadable = 0
        self.socket = gate.context.socket(zmq.ROUTER)
        self.socket.set_hwm(0)
        self.socket.curve_server = True
        self.socket.curve_secretkey = gate.keys.server_secret.encode()
        self._strangers = StrangerCount(self.socket)
        self._bind(f"tcp://{host}:{port or '*'}")
        address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.endpoint = Endpoint(address=address, keys=gate.keys.client)

    def _bind(self, address: str) -> None:
        try:
            self.socket.bind(address)
        except zmq.ZMQError:
            self.close(linger_ms=0)
            raise

    @property
    def num_dropped(self) -> int:
        """Messages that could not be read, and connections that did not come in."""
        return self._num_unreadable + self._strangers.count()

    @property
    def connections(self) -> zmq.Socket[bytes]:
        """Readable when connections have come or gone that `num_dropped` does not know of yet."""
        return self._strangers.events

    def receive(self) -> tuple[bytes, _Message] | None:
        """The next message and who sent it, if one is there."""
        while self.socket.poll(0):
            sender, *frames = self.socket.recv_multipart()
            try:
                return sender, read(self._decode, frames)
            except Unreadable as error:
                self._num_unreadable += 1
                logger.warning("dropped what %r sent: %s", sender, error)
        return None

    def send(self, receiver: bytes, payload: bytes) -> None:
        """Queue a message; it is lost if the receiver is not there."""
        self.socket.send_multipart([receiver, payload])

    def close(self, linger_ms: int) -> None:
        """Send what is queued for so long at most."""
        self._strangers.close()
        self.socket.close(linger=linger_ms)
