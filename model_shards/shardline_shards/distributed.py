"""Process groups: the store they meet at, one group a stage, the links between stages."""

import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from shardline_shards.collectives import (
    STEP_LIMIT,
    Collectives,
    SingleRank,
    StageCollectives,
    brief,
)
from shardline_shards.errors import LostPeer
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.ledger import Ledger, Operation

# Ranks meet when all have said that they are there, so who does not come soon has died meanwhile.
_FORM_LIMIT = timedelta(seconds=10)


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
        timeout=_FORM_LIMIT,
        master_listen_fd=listener.detach(),
    )


def join_store(host: str, port: int, world_size: int) -> TCPStore:
    """A client of the store at `host:port`."""
    return TCPStore(
        host, port, world_size, is_master=False, wait_for_workers=False, timeout=_FORM_LIMIT
    )


def interface_of(host: str) -> str:
    """The network interface that carries `host`; raises ValueError if none of this node does."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return name
    raise ValueError(f"no network interface of this node has the address {host}")


class Communicators:
    """What one worker uses to reach others; all groups are formed at once, none later."""

    def __init__(
        self,
        layout: ParallelLayout,
        place: Place,
        host: str,
        device: torch.device,
        ledger: Ledger,
    ) -> None:
        self.ledger = ledger
        self.layout = layout
        self.place = place
        self.device = device
        self.previous: StageLink | None = None
        self.next: StageLink | None = None
        self._stage = StageCollectives(place.tp_rank, layout.tp, ledger) if layout.tp > 1 else None
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        if layout.world_size > 1:
            os.environ[f"{self._backend.upper()}_SOCKET_IFNAME"] = interface_of(host)

    @property
    def collectives(self) -> Collectives:
        """The same object for as long as this worker lives, whatever groups come and go."""
        return self._stage or SingleRank()

    def form_at(self, host: str, port: int) -> None:
        """Meet all other ranks at the store that one of them keeps there. Raises LostPeer."""
        with _losing("the store cannot be reached"):
            store = join_store(host, port, self.layout.world_size)
        self.form(store)

    def form(self, store: Store) -> None:
        """Meet all other ranks at `store`. Raises LostPeer if one of them goes meanwhile.

        Every connection is made here: gloo joins all ranks of a group when it is formed, NCCL does
        if it is told the device, and splits the first communicator for the others. gloo's limit is
        the one for this; each operation later brings its own.
        """
        with _losing("the process groups cannot be formed"):
            dist.init_process_group(
                self._backend,
                store=store,
                rank=self.layout.rank(self.place),
                world_size=self.layout.world_size,
                timeout=self._limit,
                device_id=self.device if self._backend == "nccl" else None,
            )
            self._form_stages()
            self._form_borders()

    def abandon(self) -> None:
        """Drop all groups without asking anybody, because a rank is gone.

        gloo cannot abort what waits for a peer (`abort` does nothing), but a rank that closes its
        connections wakes those who wait for it: so all survivors get out, one after the other.
        """
        self.previous = self.next = None
        if self._stage is not None:
            self._stage.abandon()
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # of what is broken anyway
                dist.destroy_process_group()
        # Groups are named by this count, and who failed to form them has gone on counting alone.
        dist.distributed_c10d._world.group_count = 0

    def _form_stages(self) -> None:
        if self._stage is None:
            return
        for stage_index in range(self.layout.pp):
            group = self._new_group(self.layout.stage_ranks(stage_index))
            if stage_index == self.place.stage_index:
                self._stage.form(group, self.device)

    def _form_borders(self) -> None:
        """One group for each pair of neighbours, so that a border never waits for another one."""
        layout, place = self.layout, self.place
        for stage_index in range(layout.pp - 1):
            for tp_rank in range(layout.tp):
                sender = Place(stage_index, tp_rank)
                receiver = Place(stage_index + 1, tp_rank)
                group = self._new_group([layout.rank(sender), layout.rank(receiver)])
                if place == sender:
                    self.next = StageLink(group, layout.rank(receiver), receiver, self.ledger)
                elif place == receiver:
                    self.previous = StageLink(group, layout.rank(sender), sender, self.ledger)

    @property
    def _limit(self) -> timedelta:
        return STEP_LIMIT if self._backend == "nccl" else _FORM_LIMIT

    def _new_group(self, ranks: list[int]) -> dist.ProcessGroup:
        group: dist.ProcessGroup = dist.new_group(ranks, timeout=self._limit)
        return group

    def close(self) -> None:
        """Leave all groups, together: a rank that leaves early breaks what others still receive."""
        if dist.is_initialized():
            if self.next is not None:
                self.next.flush()
            dist.barrier()
            dist.destroy_process_group()


@contextmanager
def _losing(what: str) -> Iterator[None]:
    """Errors of torch's groups mean that another rank is gone, or the network to it."""
    try:
        yield
    except RuntimeError as error:
        raise LostPeer(f"{what} ({brief(error)})") from error


class StageLink:
    """The way to a neighbouring stage. Sends do not wait for the receiver."""

    MAX_PENDING = 4

    def __init__(
        self, group: dist.ProcessGroup, peer: int, peer_place: Place, ledger: Ledger
    ) -> None:
        self._group = group
        self._peer = peer
        self._peer_name = str(peer_place)
        self._ledger = ledger
        self._pending: deque[tuple[dist.Work | None, Tensor]] = deque()

    def send(self, hidden: Tensor) -> None:
        """Hand on hidden states; the tensor is kept until it has left."""
        self._ledger.note(Operation.SEND, hidden.shape)
        hidden = hidden.contiguous()
        with _losing(f"the connection to {self._peer_name} broke"):
            work = dist.isend(hidden, self._peer, group=self._group)
        self._pending.append((work, hidden))
        if len(self._pending) > self.MAX_PENDING:
            self._wait_for_oldest()

    def flush(self) -> None:
        """Wait until everything has left."""
        while self._pending:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        work, hidden = self._pending.popleft()
        self._wait_for(work, hidden)

    def begin_receive(
        self, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> Callable[[], Tensor]:
        """Let hidden states [num_tokens, width] come in meanwhile; the result waits for them.

        gloo's messages do not leave before somebody wants them, which takes 0.2 ms of asking.
        """
        hidden = torch.empty(num_tokens, width, dtype=dtype, device=device)
        with _losing(f"the connection to {self._peer_name} broke"):
            work = dist.irecv(hidden, self._peer, group=self._group)

        def wait() -> Tensor:
            self._ledger.note(Operation.RECEIVE, (num_tokens, width))
            self._wait_for(work, hidden)
            return hidden

        return wait

    def _wait_for(self, work: dist.Work | None, hidden: Tensor) -> None:
        """On CUDA the stream waits, and not this thread."""
        if work is not None:
            with _losing(f"the connection to {self._peer_name} broke"):
                work.wait(*() if hidden.is_cuda else (STEP_LIMIT,))
