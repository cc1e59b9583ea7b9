"""Collectives between the ranks of a stage that live on one node, through memory they share.

The memory has no name, so nothing is left behind however its users end: rank 0 makes it, and the
others open it through rank 0's entry in /proc.
"""

import os
import secrets
import sys
from typing import Any

import torch
from torch import Tensor

from shardline_shards.attention.cpu import load_kernel
from shardline_shards.exchange import ExchangeCollectives

_TOKEN_BYTES = 16


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
    descriptor, ticket = _create(size) if rank == 0 else (-1, _no_ticket())
    ticket = exchange.all_gather(ticket)[0]
    memory = None
    try:
        if rank != 0:
            descriptor = _open(ticket)
        if descriptor >= 0:
            memory = torch.classes.shardline.SharedMemory(descriptor, rank, size)
        answers = exchange.all_gather(torch.tensor([memory is not None]))
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return SharedMemoryCollectives(memory, rank, size) if all(answers) else None


def _no_ticket() -> Tensor:
    """Process, descriptor and token; all zero where there is nothing to open."""
    return torch.zeros(2 + _TOKEN_BYTES, dtype=torch.int64)


def _create(size: int) -> tuple[int, Tensor]:
    if sys.platform != "linux" or not load_kernel():
        return -1, _no_ticket()
    descriptor = os.memfd_create("shardline-collectives")
    os.ftruncate(descriptor, torch.classes.shardline.SharedMemory.num_bytes(size))
    token = secrets.token_bytes(_TOKEN_BYTES)
    os.pwrite(descriptor, token, 0)
    return descriptor, torch.tensor([os.getpid(), descriptor, *token])


def _open(ticket: Tensor) -> int:
    """The descriptor of what rank 0 has made, if this process can see it; else -1.

    On another node, or in another container, the same path may be something else: the token tells.
    """
    process_id, number, *token = ticket.tolist()
    if process_id == 0 or not load_kernel():
        return -1
    try:
        descriptor = os.open(f"/proc/{process_id}/fd/{number}", os.O_RDWR)
    except OSError:
        return -1
    try:
        is_it = os.pread(descriptor, _TOKEN_BYTES, 0) == bytes(token)
    except OSError:
        is_it = False
    if not is_it:
        os.close(descriptor)
        return -1
    return descriptor
