"""Communicators of workers on GPUs: process groups of torch, one a stage and one for each link."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from shardline_shards.collectives import brief
from shardline_shards.communicators import Communicators
from shardline_shards.errors import LostPeer
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.ledger import Ledger, Operation
from shardline_shards.store import host_store, join_store

# For what another rank is awaited within a step; who is stuck is found out long before.
_STEP_LIMIT = timedelta(minutes=5)


def interface_of(host: str) -> str:
    """The network interface that carries `host`; raises ValueError if none of this node does."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return name
    raise ValueError(f"no network interface of this node has the address {host}")


class GroupCommunicators(Communicators):
    """Formed with NCCL at a store that rank 0 keeps. NCCL encrypts nothing.

    Every connection is made at once: NCCL does so if it is told the device, and splits the first
    communicator for the other groups. `backend` is another one in tests, where no GPU is.
    """

    def __init__(
        self,
        layout: ParallelLayout,
        place: Place,
        ledger: Ledger,
        host: str,
        device: torch.device,
        backend: str = "nccl",
        *,
        shares_drawn: bool = False,
    ) -> None:
        super().__init__(layout, place, ledger, shares_drawn)
        self._host = host
        self._device = device
        self._backend = backend
        self._store: TCPStore | None = None
        if layout.world_size > 1:
            os.environ[f"{backend.upper()}_SOCKET_IFNAME"] = interface_of(host)

    def open(self, generation: int) -> str | None:
        """Rank 0 opens the store, and returns where it is."""
        if self._rank != 0 or self.layout.world_size == 1:
            return None
        self._store = host_store(self._host, self.layout.world_size)
        return f"{self._host}:{self._store.port}"

    def form(self, addresses: Sequence[str | None]) -> None:
        """Meet all other ranks at the first one's store."""
        if self.layout.world_size == 1:
            return
        with _losing("the process groups cannot be formed"):
            dist.init_process_group(
                self._backend,
                store=self._store or self._join(str(addresses[0])),
                rank=self._rank,
                world_size=self.layout.world_size,
                timeout=_STEP_LIMIT,
                device_id=self._device if self._device.type == "cuda" else None,
            )
            self._form_stages()
            self._form_borders()
            self._form_way_of_drawn()

    def abandon(self) -> None:
        """As for all communicators."""
        super().abandon()
        self._store = None
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # of what is broken anyway
                dist.destroy_process_group()
        # Groups are named by this count, and who failed to form them has gone on counting alone.
        dist.distributed_c10d._world.group_count = 0

    def close(self) -> None:
        """When all ranks do."""
        if dist.is_initialized():
            for link in (self.next, self.drawn):
                if isinstance(link, GroupLink):
                    link.flush()
            dist.barrier()
            dist.destroy_process_group()

    @property
    def _rank(self) -> int:
        return self.layout.rank(self.place)

    def _join(self, address: str) -> TCPStore:
        host, _, port = address.rpartition(":")
        return join_store(host, int(port), self.layout.world_size)

    def _form_stages(self) -> None:
        if self._stage is None:
            return
        for stage_index in range(self.layout.pp):
            group = _new_group(self.layout.stage_ranks(stage_index))
            if stage_index == self.place.stage_index:
                self._stage.form(GroupCollectives(group))

    def _form_borders(self) -> None:
        """One group for each pair of neighbours, so that a border never waits for another one."""
        layout, place = self.layout, self.place
        for stage_index in range(layout.pp - 1):
            for tp_rank in range(layout.tp):
                sender = Place(stage_index, tp_rank)
                receiver = Place(stage_index + 1, tp_rank)
                group = _new_group([layout.rank(sender), layout.rank(receiver)])
                if place == sender:
                    self.next = self._link(group, receiver)
                elif place == receiver:
                    self.previous = self._link(group, sender)

    def _form_way_of_drawn(self) -> None:
        ends = self._ends_of_drawn()
        if not ends:
            return
        group = _new_group([self.layout.rank(place) for place in ends])
        if (across := self._across()) is not None:
            self.drawn = self._link(group, across, is_shared=False)

    def _link(
        self, group: dist.ProcessGroup, peer: Place, *, is_shared: bool = True
    ) -> "GroupLink":
        rank = self.layout.rank(peer)
        return GroupLink(group, rank, peer, self._device, self.ledger, is_shared=is_shared)


def _new_group(ranks: list[int]) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(ranks, timeout=_STEP_LIMIT)
    return group


@contextmanager
def _losing(what: str) -> Iterator[None]:
    """Errors of torch's groups mean that another rank is gone, or the network to it."""
    try:
        yield
    except RuntimeError as error:
        raise LostPeer(f"{what} ({brief(error)})") from error


class GroupCollectives:
    """Collectives on the communicator of one stage."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather_last_dim(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Concatenate over ranks; parts are padded, since NCCL gathers equal sizes."""
        widest = max(sizes)
        padded = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        narrowed = [part[..., :size] for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(narrowed, dim=-1) if self.rank == 0 else tensor


class GroupLink:
    """A StageLink over a group of two; `is_shared` if all ranks of the stage have one like it."""

    MAX_PENDING = 4

    def __init__(
        self,
        group: dist.ProcessGroup,
        peer: int,
        peer_place: Place,
        device: torch.device,
        ledger: Ledger,
        *,
        is_shared: bool = True,
    ) -> None:
        self._group = group
        self._peer = peer
        self._peer_name = str(peer_place)
        self._device = device
        self._ledger = ledger
        self._is_shared = is_shared
        self._pending: deque[tuple[dist.Work | None, Tensor]] = deque()

    def send(self, hidden: Tensor) -> None:
        """As for all links; the tensor is kept until it has left."""
        self._ledger.note(Operation.SEND, hidden.shape, is_shared=self._is_shared)
        hidden = hidden.contiguous()
        with self._losing_peer():
            work = dist.isend(hidden, self._peer, group=self._group)
        self._pending.append((work, hidden))
        if len(self._pending) > self.MAX_PENDING:
            self._wait_for_oldest()

    def flush(self) -> None:
        """Wait until everything has left."""
        while self._pending:
            self._wait_for_oldest()

    def begin_receive(
        self, num_tokens: int, width: int, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """Let them come in meanwhile."""
        hidden = torch.empty(num_tokens, width, dtype=dtype, device=self._device)
        with self._losing_peer():
            work = dist.irecv(hidden, self._peer, group=self._group)

        def wait() -> Tensor:
            self._ledger.note(Operation.RECEIVE, (num_tokens, width), is_shared=self._is_shared)
            self._wait_for(work, hidden)
            return hidden

        return wait

    def _wait_for_oldest(self) -> None:
        self._wait_for(*self._pending.popleft())

    def _wait_for(self, work: dist.Work | None, hidden: Tensor) -> None:
        """On CUDA the stream waits, and not this thread."""
        if work is not None:
            with self._losing_peer():
                work.wait(*() if hidden.is_cuda else (_STEP_LIMIT,))

    def _losing_peer(self) -> contextlib.AbstractContextManager[None]:
        return _losing(f"the connection to {self._peer_name} broke")
