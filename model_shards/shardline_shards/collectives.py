"""What the ranks of one stage do together: sum and gather. The backend decides how."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shardline_shards.errors import LostPeer
from shardline_shards.ledger import Ledger, Operation
from shardline_shards.shared_memory import SharedMemoryCollectives, share_memory

# For what another rank is awaited within a step; who is stuck is found out long before.
STEP_LIMIT = timedelta(minutes=5)


class Collectives(Protocol):
    """Collectives over the tensor axis of one stage. Every rank calls them in the same order."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks; the same bits on every rank. May overwrite `tensor`."""

    def gather_last_dim(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Concatenate [..., sizes[rank]] over ranks on rank 0; others get their own part back."""


class SingleRank:
    """No tensor axis: nothing to do."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather_last_dim(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """The tensor itself."""
        return tensor


class ExchangeCollectives:
    """Collectives made of point-to-point messages, for gloo.

    gloo's own `all_reduce` costs more than a millisecond between two processes even for one row,
    its sends and receives a tenth of that. Every rank sends its tensor to all others and adds what
    it gets in the order of ranks, so the sum has the same bits everywhere.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in the order of ranks, accumulated in fp32."""
        tensor = tensor.contiguous()
        others = [rank for rank in range(self.size) if rank != self.rank]
        parts = {rank: torch.empty_like(tensor) for rank in others}
        self._wait_all(
            [self._receive(parts[rank], rank) for rank in others]
            + [self._send(tensor, rank) for rank in others]
        )
        parts[self.rank] = tensor
        total = parts[0].to(torch.float32)
        for rank in range(1, self.size):
            total = total + parts[rank]
        return total.to(tensor.dtype)

    def gather_last_dim(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Concatenate over ranks on rank 0; other ranks get their own part back."""
        tensor = tensor.contiguous()
        if self.rank != 0:
            self._wait_all([self._send(tensor, 0)])
            return tensor
        parts = [tensor] + [tensor.new_empty(*tensor.shape[:-1], size) for size in sizes[1:]]
        self._wait_all([self._receive(parts[rank], rank) for rank in range(1, self.size)])
        return torch.cat(parts, dim=-1)

    def _send(self, tensor: Tensor, rank: int) -> dist.Work | None:
        return dist.isend(tensor, group=self.group, group_dst=rank) if tensor.numel() else None

    def _receive(self, tensor: Tensor, rank: int) -> dist.Work | None:
        return dist.irecv(tensor, group=self.group, group_src=rank) if tensor.numel() else None

    @staticmethod
    def _wait_all(works: list[dist.Work | None]) -> None:
        for work in works:
            if work is not None:
                work.wait(STEP_LIMIT)


class NcclCollectives:
    """Collectives of the CUDA backend, on the communicator of one stage."""

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


class StageCollectives:
    """The collectives of a stage for as long as the worker lives; the layers hold these.

    The group behind them goes when a rank of it dies, and another comes. Raise LostPeer.
    """

    def __init__(self, rank: int, size: int, ledger: Ledger) -> None:
        self.rank = rank
        self.size = size
        self._ledger = ledger
        self._current: Collectives | None = None

    def form(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """From now on over `group`."""
        if device.type == "cuda":
            self._current = NcclCollectives(group)
        else:
            self._current = share_memory(group) or ExchangeCollectives(group)

    def abandon(self) -> None:
        """The group is gone."""
        if isinstance(self._current, SharedMemoryCollectives):
            self._current.leave()
        self._current = None

    @property
    def shared_memory(self) -> Any | None:
        """What the CPU kernel can sum through by itself; None where ranks share no memory."""
        group = self._current
        return group.memory if isinstance(group, SharedMemoryCollectives) else None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks; the same bits on every rank. May overwrite `tensor`."""
        with self.noticing_loss(Operation.ALL_REDUCE, tensor.shape):
            return self._group().all_reduce(tensor)

    def gather_last_dim(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Concatenate [..., sizes[rank]] over ranks on rank 0; others get their own part back."""
        with self.noticing_loss(Operation.GATHER, (*tensor.shape[:-1], sum(sizes))):
            return self._group().gather_last_dim(tensor, sizes)

    @contextmanager
    def noticing_loss(self, operation: Operation, shape: Sequence[int]) -> Iterator[None]:
        """An error while ranks work together means that one of them is lost; the ledger is told."""
        self._ledger.note(operation, shape)
        try:
            yield
        except RuntimeError as error:
            reason = brief(error)
            raise LostPeer(
                f"the connection to another rank of this stage broke ({reason})"
            ) from error

    def _group(self) -> Collectives:
        assert self._current is not None, "the ranks of this stage have not met"
        return self._current


def brief(error: RuntimeError) -> str:
    """What gloo or NCCL says, without its advice."""
    return str(error).splitlines()[0].partition(". This is")[0]
