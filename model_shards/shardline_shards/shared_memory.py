"""Collectives between the ranks of a stage that live on one node, through memory they share."""

import os
from typing import Any

import torch
from torch import Tensor

from shardline_shards.attention.cpu import load_kernel
from shardline_shards.exchange import ExchangeCollectives
from shardline_shards.node_memory import create_memory, no_ticket, open_memory


class SharedMemoryCollectives:
    """Sums and gathers of the CPU kernel.

    Messages cost 100 µs and more each, these a few. Raises RuntimeError when another rank is gone.
    """

    def __init__(self, memory: Any, rank: int, size: int) -> None:
        self.memory = memory
        self.rank = rank
        self.size = size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in the order of ranks, accumulated in fp32."""
        total: Tensor = self.memory.all_reduce(tensor.contiguous())
        return total

    def gather_last_dim(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Concatenate over ranks on rank 0; other ranks get their own part back."""
        gathered: Tensor = self.memory.gather(tensor.contiguous().flatten(0, -2), sizes)
        return gathered.view(*tensor.shape[:-1], gathered.shape[-1])

    def leave(self) -> None:
        """Let those go who wait for this rank."""
        self.memory.leave()


def share_memory(exchange: ExchangeCollectives) -> SharedMemoryCollectives | None:
    """Collectives among the same ranks, or None on every rank if any of them cannot share memory.

    That is so where ranks are on several nodes, or have no compiled kernel.
    """
    rank, size = exchange.rank, exchange.size
    descriptor, ticket = _create(size) if rank == 0 else (-1, no_ticket())
    ticket = exchange.all_gather(ticket)[0]
    memory = None
    try:
        if rank != 0:
            descriptor = open_memory(ticket) if load_kernel() else -1
        if descriptor >= 0:
            memory = torch.classes.shardline.SharedMemory(descriptor, rank, size)
        answers = exchange.all_gather(torch.tensor([memory is not None]))
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return SharedMemoryCollectives(memory, rank, size) if all(answers) else None


def _create(size: int) -> tuple[int, Tensor]:
    if not load_kernel():
        return -1, no_ticket()
    return create_memory("collectives", torch.classes.shardline.SharedMemory.num_bytes(size))
