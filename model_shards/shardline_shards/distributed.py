"""Process groups: the store they meet at, one group a stage, the links between stages."""

import os
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from shardline_shards.collectives import Collectives, make_collectives
from shardline_shards.layout import ParallelLayout, Place

_FORM_TIMEOUT = timedelta(minutes=5)


def host_store(host: str, world_size: int) -> TCPStore:
    """A store on a port that the system chooses; `store.port` tells it to the others."""
    return open_store(socket.create_server((host, 0)), world_size)


def open_store(listener: socket.socket, world_size: int) -> TCPStore:
    """A store behind a bound socket; left to itself it would listen at every address."""
    host, port = listener.getsockname()[:2]
    return TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        wait_for_workers=False,
        timeout=_FORM_TIMEOUT,
        master_listen_fd=listener.detach(),
    )


def join_store(host: str, port: int, world_size: int) -> TCPStore:
    """A client of the store at `host:port`."""
    return TCPStore(
        host, port, world_size, is_master=False, wait_for_workers=False, timeout=_FORM_TIMEOUT
    )


def interface_of(host: str) -> str:
    """The network interface that carries `host`; raises ValueError if none of this node does."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return name
    raise ValueError(f"no network interface of this node has the address {host}")


class Communicators:
    """What one worker uses to reach others; all groups are formed here, none later."""

    def __init__(
        self,
        layout: ParallelLayout,
        place: Place,
        store: Store | None,
        host: str,
        device: torch.device,
    ) -> None:
        self.device = device
        self.collectives: Collectives = make_collectives(None, device)
        self.previous: StageLink | None = None
        self.next: StageLink | None = None
        if layout.world_size == 1:
            return
        backend = "nccl" if device.type == "cuda" else "gloo"
        os.environ[f"{backend.upper()}_SOCKET_IFNAME"] = interface_of(host)
        dist.init_process_group(
            backend,
            store=store,
            rank=layout.rank(place),
            world_size=layout.world_size,
            timeout=_FORM_TIMEOUT,
        )
        self._form_stages(layout, place)
        self._form_borders(layout, place)

    def _form_stages(self, layout: ParallelLayout, place: Place) -> None:
        if layout.tp == 1:
            return
        for stage_index in range(layout.pp):
            group = dist.new_group(layout.stage_ranks(stage_index))
            if stage_index == place.stage_index:
                self.collectives = make_collectives(group, self.device)

    def _form_borders(self, layout: ParallelLayout, place: Place) -> None:
        """One group for each pair of neighbours, so that a border never waits for another one."""
        for stage_index in range(layout.pp - 1):
            for tp_rank in range(layout.tp):
                sender = Place(stage_index, tp_rank)
                receiver = Place(stage_index + 1, tp_rank)
                group = dist.new_group([layout.rank(sender), layout.rank(receiver)])
                if place == sender:
                    self.next = StageLink(group, layout.rank(receiver), str(receiver))
                elif place == receiver:
                    self.previous = StageLink(group, layout.rank(sender), str(sender))

    def close(self) -> None:
        """Leave all groups, together: a rank that leaves early breaks what others still receive."""
        if dist.is_initialized():
            if self.next is not None:
                self.next.flush()
            dist.barrier()
            dist.destroy_process_group()


class LostPeer(RuntimeError):
    """A neighbouring stage cannot be reached any more."""


class StageLink:
    """The way to a neighbouring stage. Sends do not wait for the receiver."""

    MAX_PENDING = 4

    def __init__(self, group: dist.ProcessGroup, peer: int, peer_name: str) -> None:
        self._group = group
        self._peer = peer
        self._peer_name = peer_name
        self._pending: deque[tuple[dist.Work | None, Tensor]] = deque()

    def send(self, hidden: Tensor) -> None:
        """Hand on hidden states; the tensor is kept until it has left."""
        hidden = hidden.contiguous()
        with self._naming_peer():
            work = dist.isend(hidden, self._peer, group=self._group)
        self._pending.append((work, hidden))
        if len(self._pending) > self.MAX_PENDING:
            self._wait_for_oldest()

    def flush(self) -> None:
        """Wait until everything has left."""
        while self._pending:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        work, _ = self._pending.popleft()
        if work is not None:
            with self._naming_peer():
                work.wait()

    def receive(
        self, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Wait for hidden states [num_tokens, width]."""
        hidden = torch.empty(num_tokens, width, dtype=dtype, device=device)
        with self._naming_peer():
            dist.recv(hidden, self._peer, group=self._group)
        return hidden

    @contextmanager
    def _naming_peer(self) -> Iterator[None]:
        """Say whose connection broke: that worker is gone, or the network to it."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0].partition(". This is")[0]
            raise LostPeer(f"the connection to {self._peer_name} broke ({reason})") from error
