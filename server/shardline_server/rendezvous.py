"""How nodes find the head: a board at the head's address, and sealed notes on it.

The head writes a `Job`; each other node answers with its `NodeFacts`, and gets an `Assignment`,
which holds the keys to all other channels. Notes are encrypted and authenticated under the launch's
secret, so a stranger can neither join nor mislead, nor read them; where the head keeps the board,
he cannot reach it at all.
"""

import hashlib
import os
import platform
import socket
import time
import timeit
from collections.abc import Callable
from importlib import metadata
from typing import Protocol, TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec import Struct

from shardline_server.board_client import OTHER_SECRET, BoardClient
from shardline_server.board_keeper import BoardKeeper
from shardline_server.engine_config import BoardAddress
from shardline_server.errors import ConfigError
from shardline_server.launcher_store import join_launcher_store
from shardline_server.placement import Capacity
from shardline_shards.channel import Endpoint
from shardline_shards.gate import LaunchKeys
from shardline_shards.messages import WorkerConfig

_Note = TypeVar("_Note", bound=Struct)
_SLICE_S = 1.0
_NUM_PINGS = 10
_NONCE_BYTES = 12


class Job(Struct, frozen=True, kw_only=True):
    """What the head serves, and with which settings; every node checks that it can take part."""

    num_nodes: int
    versions: dict[str, str]
    model: str
    agreed: dict[str, str]
    device: str
    needs_weights: bool
    fingerprint: str


class NodeFacts(Struct, frozen=True, kw_only=True):
    """A node that has come, with what it has and how far away it is.

    With a `problem` it cannot take part, and says why.
    """

    name: str
    address: str
    problem: str | None = None
    capacity: Capacity = Capacity(is_cuda=False, num_devices=0)
    round_trip_s: float = 0.0


class Assignment(Struct, frozen=True, kw_only=True):
    """What a node runs, or why the head sends it away."""

    refusal: str | None = None
    workers: list[WorkerConfig] = []
    threads_per_worker: int | None = None
    watch: Endpoint | None = None


class Store(Protocol):
    """Where notes and counters are; every method raises ConfigError if the head has gone."""

    def set(self, key: str, content: bytes) -> None:
        """Write a note."""

    def count(self, key: str) -> int:
        """Add one to a counter; returns the sum."""

    def is_there(self, key: str, within_s: float) -> bool:
        """Whether a note comes so soon."""

    def get(self, key: str) -> bytes:
        """A note that is there."""

    def close(self) -> None:
        """Hang up."""


class NoteBoard:
    """Sealed notes in the store of a rendezvous."""

    def __init__(self, store: Store, secret: str) -> None:
        self._store = store
        self._cipher = AESGCM(_derive_key(secret, b"shardline rendezvous"))

    def put(self, key: str, note: Struct) -> None:
        """Write a note."""
        nonce = os.urandom(_NONCE_BYTES)
        content = nonce + self._cipher.encrypt(nonce, msgspec.msgpack.encode(note), key.encode())
        self._store.set(key, content)

    def take(
        self, key: str, kind: type[_Note], deadline: float, missing: Callable[[], str]
    ) -> _Note:
        """Wait for a note until `deadline` on the monotonic clock.

        Raises ConfigError: `missing()` if it does not come, or that it cannot be opened or read.
        """
        while not self._store.is_there(key, _SLICE_S):
            if time.monotonic() >= deadline:
                raise ConfigError(missing())
        payload = self._open(key, self._store.get(key))
        try:
            return msgspec.msgpack.decode(payload, type=kind)
        except msgspec.ValidationError as error:
            raise ConfigError(f"another version of Shardline wrote the note {key}") from error

    def draw_number(self) -> int:
        """This node's number: 1 for the first that asks."""
        return self._store.count("arrivals")

    def claim(self, number: int) -> bool:
        """Whether this is the first node of that number."""
        return self._store.count(f"claims/{number}") == 1

    def measure_round_trip(self) -> float:
        """Seconds to the head and back, the best of a few."""
        return min(timeit.repeat(lambda: self._store.count("pings"), number=1, repeat=_NUM_PINGS))

    def close(self) -> None:
        """Hang up; the notes stay."""
        self._store.close()

    def _open(self, key: str, content: bytes) -> bytes:
        nonce, sealed = content[:_NONCE_BYTES], content[_NONCE_BYTES:]
        try:
            return self._cipher.decrypt(nonce, sealed, key.encode())
        except (InvalidTag, ValueError) as error:
            raise ConfigError(OTHER_SECRET) from error


def _derive_key(secret: str, purpose: bytes) -> bytes:
    """Slow on purpose (about 50 ms): an operator's secret may be one that can be guessed."""
    return hashlib.scrypt(secret.encode(), salt=purpose, n=2**14, r=8, p=1, dklen=32)


def derive_keys(secret: str) -> LaunchKeys:
    """Those of the board's channel: one pair for the head, one for all that come."""
    server = _derive_key(secret, b"shardline rendezvous: head")
    client = _derive_key(secret, b"shardline rendezvous: nodes")
    return LaunchKeys.of(server, client)


def keep_board(address: BoardAddress, secret: str) -> BoardKeeper:
    """The head's board, listening at that address and no other. Raises ConfigError if it cannot."""
    try:
        host = socket.gethostbyname(address.host)
        return BoardKeeper(derive_keys(secret), host, address.port)
    except OSError as error:
        raise ConfigError(f"--rendezvous {address} cannot be opened: {error.strerror}") from error


def find_board(address: BoardAddress, secret: str, deadline: float) -> NoteBoard:
    """The board, for head and nodes alike; waits for it until `deadline` on the monotonic clock.

    Raises ConfigError if it does not come, or belongs to another secret.
    """
    if address.is_kept_by_launcher:
        return NoteBoard(join_launcher_store(address, deadline), secret)
    return NoteBoard(BoardClient(address, derive_keys(secret).client, deadline), secret)


def own_versions() -> dict[str, str]:
    """What has to be the same on every node."""
    names = ("shardline", "torch", "transformers")
    return {name: metadata.version(name) for name in names}


def own_address(towards: str, port: int) -> str:
    """The address of this node on its way to `towards`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, port))
        return str(probe.getsockname()[0])


def node_name() -> str:
    """How this node calls itself in messages."""
    return platform.node() or "node"


def parse_board(address: str, own_host: str | None = None) -> BoardAddress:
    """The board at `HOST:PORT`, or for one's own host at `:PORT`. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    host = host or own_host or ""
    if not host or not port.isdigit():
        raise ConfigError(f"{address!r} is not HOST:PORT, such as 10.0.0.1:29500")
    return BoardAddress(host=host, port=int(port))
