"""Torch's store: NCCL's groups meet at ours, and a launcher's nodes at its own."""

import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

# Ranks meet when all have said that they are there, so who does not come soon has died meanwhile.
FORM_LIMIT = timedelta(seconds=10)


def host_store(host: str, world_size: int) -> TCPStore:
    """A store on a port that the system chooses; `store.port` tells it to the others.

    It is given a bound socket: left to itself it would listen at every address.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        wait_for_workers=False,
        timeout=FORM_LIMIT,
        master_listen_fd=listener.detach(),
    )


def join_store(host: str, port: int, world_size: int) -> TCPStore:
    """A client of the store at `host:port`."""
    return TCPStore(
        host, port, world_size, is_master=False, wait_for_workers=False, timeout=FORM_LIMIT
    )
