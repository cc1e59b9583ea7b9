"""How nodes find the head: a store at the head's address, and sealed notes in it.

The head writes a `Job`; each other node answers with its `NodeFacts`, and gets an `Assignment`,
which holds the keys to all other channels. Notes are encrypted and authenticated under the launch's
secret, so a stranger can neither join nor mislead, nor read them.
"""

import hashlib
import os
import platform
import socket
import time
import timeit
from collections.abc import Callable
from datetime import timedelta
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec import Struct

from shardline_server.engine_config import BoardAddress
from shardline_server.errors import ConfigError
from shardline_server.placement import Capacity
from shardline_shards.channel import Endpoint
from shardline_shards.messages import WorkerConfig

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_Note = TypeVar("_Note", bound=Struct)
_SLICE_S = 1.0
_NUM_PINGS = 10
_NONCE_BYTES = 12
_NUM_ENDS = 2  # the store wants a number, and does not wait for it


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


class NoteBoard:
    """Sealed notes in the store of a rendezvous."""

    def __init__(self, store: "Store", secret: str) -> None:
        self._store = store
        self._cipher = AESGCM(_derive_key(secret))

    def put(self, key: str, note: Struct) -> None:
        """Write a note."""
        nonce = os.urandom(_NONCE_BYTES)
        content = nonce + self._cipher.encrypt(nonce, msgspec.msgpack.encode(note), key.encode())
        self._store.set(key, content)  # type: ignore[arg-type]  # bytes go as well

    def take(
        self, key: str, kind: type[_Note], deadline: float, missing: Callable[[], str]
    ) -> _Note:
        """Wait for a note until `deadline` on the monotonic clock.

        Raises ConfigError: `missing()` if it does not come, or that it cannot be opened or read.
        """
        while not self._is_there(key):
            if time.monotonic() >= deadline:
                raise ConfigError(missing())
        payload = self._open(key, bytes(self._store.get(key)))
        try:
            return msgspec.msgpack.decode(payload, type=kind)
        except msgspec.ValidationError as error:
            raise ConfigError(f"another version of Shardline wrote the note {key}") from error

    def draw_number(self) -> int:
        """This node's number: 1 for the first that asks."""
        return int(self._store.add("arrivals", 1))

    def claim(self, number: int) -> bool:
        """Whether this is the first node of that number."""
        return int(self._store.add(f"claims/{number}", 1)) == 1

    def measure_round_trip(self) -> float:
        """Seconds to the head and back, the best of a few."""
        return min(timeit.repeat(lambda: self._store.add("pings", 1), number=1, repeat=_NUM_PINGS))

    def _is_there(self, key: str) -> bool:
        from torch.distributed import DistStoreError

        try:
            self._store.wait([key], timedelta(seconds=_SLICE_S))
        except DistStoreError:
            return False
        except RuntimeError as error:
            raise ConfigError(f"the head has gone: {str(error).splitlines()[0]}") from error
        return True

    def _open(self, key: str, content: bytes) -> bytes:
        nonce, sealed = content[:_NONCE_BYTES], content[_NONCE_BYTES:]
        try:
            return self._cipher.decrypt(nonce, sealed, key.encode())
        except (InvalidTag, ValueError) as error:
            raise ConfigError(
                "the secrets of head and node differ; give both the same one"
            ) from error


def _derive_key(secret: str) -> bytes:
    """Slow on purpose (about 50 ms): an operator's secret may be one that can be guessed."""
    salt = b"shardline rendezvous"
    return hashlib.scrypt(secret.encode(), salt=salt, n=2**14, r=8, p=1, dklen=32)


def open_board(address: BoardAddress, secret: str) -> NoteBoard:
    """The head's board, listening at that address and no other. Raises ConfigError if it cannot."""
    if address.is_kept_by_launcher:
        return find_board(address, secret, time.monotonic())
    try:
        listener = socket.create_server((address.host, address.port))
    except OSError as error:
        raise ConfigError(f"--rendezvous {address} cannot be opened: {error.strerror}") from error
    from shardline_shards.store import open_store

    _hush_store()
    return _make_board(open_store(listener, _NUM_ENDS), address, secret)


def find_board(address: BoardAddress, secret: str, deadline: float) -> NoteBoard:
    """The same board, for a node; waits for the head until `deadline`. Raises ConfigError."""
    while True:
        try:
            socket.create_connection((address.host, address.port), timeout=_SLICE_S).close()
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ConfigError(f"no head answers at {address} ({error})") from error
            time.sleep(_SLICE_S / 5)  # refused at once; there is nothing to wait on
    from shardline_shards.store import join_store

    _hush_store()
    return _make_board(join_store(address.host, address.port, _NUM_ENDS), address, secret)


def _hush_store() -> None:
    """The store logs a stack trace for every wait that ends without a note."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def _make_board(store: "Store", address: BoardAddress, secret: str) -> NoteBoard:
    from torch._C._distributed_c10d import PrefixStore

    return NoteBoard(PrefixStore(address.prefix, store), secret)


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
