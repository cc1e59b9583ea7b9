"""Memory that processes of one node share.

It has no name, so nothing is left behind however its users end: one makes it, and the others open
it through that one's entry in /proc, by a ticket.
"""

import os
import secrets
import sys

import torch
from torch import Tensor

_TOKEN_BYTES = 16


def no_ticket() -> Tensor:
    """Process, descriptor and token, int64; all zero where there is nothing to open."""
    return torch.zeros(2 + _TOKEN_BYTES, dtype=torch.int64)


def create_memory(name: str, num_bytes: int) -> tuple[int, Tensor]:
    """Zeros behind a token, and the ticket to them; descriptor -1 where that cannot be."""
    if sys.platform != "linux":
        return -1, no_ticket()
    descriptor = os.memfd_create(f"shardline-{name}")
    os.ftruncate(descriptor, num_bytes)
    token = secrets.token_bytes(_TOKEN_BYTES)
    os.pwrite(descriptor, token, 0)
    return descriptor, torch.tensor([os.getpid(), descriptor, *token])


def open_memory(ticket: Tensor) -> int:
    """The descriptor of what the ticket stands for, if this process can see it; else -1.

    On another node, or in another container, the same path may be something else: the token tells.
    """
    process_id, number, *token = ticket.tolist()
    if process_id == 0:
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
