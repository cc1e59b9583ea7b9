"""What the ranks of one stage do together: sum and gather. What is behind them differs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from shardline_shards.errors import LostPeer
from shardline_shards.ledger import Ledger, Operation
from shardline_shards.shared_memory import SharedMemoryCollectives


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


class StageCollectives:
    """The collectives of a stage for as long as the worker lives; the layers hold these.

    Those behind them go when a rank dies, and others come. Raise LostPeer.
    """

    def __init__(self, rank: int, size: int, ledger: Ledger) -> None:
        self.rank = rank
        self.size = size
        self._ledger = ledger
        self._current: Collectives | None = None

    def form(self, collectives: Collectives) -> None:
        """From now on by these."""
        self._current = collectives

    def abandon(self) -> None:
        """They are gone."""
        if isinstance(self._current, SharedMemoryCollectives):
            self._current.leave()
        self._current = None

    @property
    def shared_memory(self) -> Any | None:
        """What the CPU kernel can sum through by itself; None where ranks share no memory."""
        current = self._current
        return current.memory if isinstance(current, SharedMemoryCollectives) else None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks; the same bits on every rank. May overwrite `tensor`."""
        with self.noticing_loss(Operation.ALL_REDUCE, tensor.shape):
            return self._met().all_reduce(tensor)

    def gather_last_dim(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Concatenate [..., sizes[rank]] over ranks on rank 0; others get their own part back."""
        with self.noticing_loss(Operation.GATHER, (*tensor.shape[:-1], sum(sizes))):
            return self._met().gather_last_dim(tensor, sizes)

    @contextmanager
    def noticing_loss(self, operation: Operation, shape: Sequence[int]) -> Iterator[None]:
        """An error while ranks work together means that one of them is lost; the ledger is told."""
        self._ledger.note(operation, shape)
        try:
            yield
        except LostPeer:
            raise
        except RuntimeError as error:
            reason = brief(error)
            raise LostPeer(
                f"the connection to another rank of this stage broke ({reason})"
            ) from error

    def _met(self) -> Collectives:
        assert self._current is not None, "the ranks of this stage have not met"
        return self._current


def brief(error: RuntimeError) -> str:
    """What gloo or NCCL says, without its advice."""
    return str(error).splitlines()[0].partition(". This is")[0]
