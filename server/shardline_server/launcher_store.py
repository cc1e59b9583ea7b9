"""The board where a launcher keeps it: torch's store, which whoever reaches it can write to."""

import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from shardline_server.engine_config import BoardAddress
from shardline_server.errors import ConfigError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_TRY_S = 1.0
_NUM_ENDS = 2  # the store wants a number, and does not wait for it


class LauncherStore:
    """Torch's store as the `Store` of a NoteBoard."""

    def __init__(self, store: "Store") -> None:
        self._store = store

    def set(self, key: str, content: bytes) -> None:
        """Write a note."""
        self._store.set(key, content)  # type: ignore[arg-type]  # bytes go as well

    def count(self, key: str) -> int:
        """Add one to a counter; returns the sum."""
        return int(self._store.add(key, 1))

    def is_there(self, key: str, within_s: float) -> bool:
        """Whether a note comes so soon. Raises ConfigError if the store has gone."""
        from torch.distributed import DistStoreError

        try:
            self._store.wait([key], timedelta(seconds=within_s))
        except DistStoreError:
            return False
        except RuntimeError as error:
            raise ConfigError(f"the head has gone: {str(error).splitlines()[0]}") from error
        return True

    def get(self, key: str) -> bytes:
        """A note that is there."""
        return bytes(self._store.get(key))

    def close(self) -> None:
        """The connection ends with this object."""


def join_launcher_store(address: BoardAddress, deadline: float) -> LauncherStore:
    """The launcher's store; waits for it until `deadline` on the monotonic clock.

    Raises ConfigError.
    """
    _wait_until_open(address, deadline)
    from torch._C._distributed_c10d import PrefixStore

    from shardline_shards.store import join_store

    _hush_store()
    store = join_store(address.host, address.port, _NUM_ENDS)
    return LauncherStore(PrefixStore(address.prefix, store))


def _wait_until_open(address: BoardAddress, deadline: float) -> None:
    while True:
        try:
            socket.create_connection((address.host, address.port), timeout=_TRY_S).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ConfigError(f"no head answers at {address} ({error})") from error
            time.sleep(_TRY_S / 5)  # refused at once; there is nothing to wait on


def _hush_store() -> None:
    """The store logs a stack trace for every wait that ends without a note."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
