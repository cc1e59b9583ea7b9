"""Ways between stages that live on one node, through memory that both ends share.

A message wakes threads of its own on both sides, on cores that compute: about a millisecond for
hidden states that are 20 KB. Here the stage that waits is woken by the one that has computed.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardline_shards.attention.cpu import load_kernel
from shardline_shards.layout import Place
from shardline_shards.mesh import Mesh
from shardline_shards.node_memory import create_memory, no_ticket, open_memory

_HEADER_BYTES = 8  # before each tensor
_LEAST_BYTES = 1 << 20
_MOST_BYTES = 1 << 31


class SharedPipe:
    """One end of a one-way pipe. Raises RuntimeError when the other end is gone."""

    def __init__(self, descriptor: int, capacity: int, *, sends: bool) -> None:
        """Of memory as `create_memory` makes it, which this end maps."""
        self._pipe: Any = torch.classes.shardline.SharedPipe(descriptor, capacity, sends)

    def send(self, tensor: Tensor) -> None:
        """Copy it; waits only while more is under way than the pipe holds."""
        self._pipe.send(tensor.contiguous())

    def receive(self, into: Tensor) -> Tensor:
        """Wait for the next tensor, which has the size of `into`."""
        self._pipe.receive(into)
        return into

    def leave(self) -> None:
        """Let the other end go if it waits for this one."""
        self._pipe.leave()


Pipes = dict[Place, SharedPipe]


def share_pipes(
    mesh: Mesh, to: Mapping[Place, Sequence[int]], sources: Sequence[Place]
) -> tuple[Pipes, Pipes]:
    """Pipes to places, which hold tensors of so many bytes each, and from places, where both ends
    can share memory. The other ends do the same at the same time. Raises LostPeer.
    """
    capacities = {place: _capacity(sizes) for place, sizes in to.items()}
    offers = {place: _offer(capacity) for place, capacity in capacities.items()}
    try:
        for place, (_, ticket) in offers.items():
            mesh.send(place, torch.cat([ticket, torch.tensor([capacities[place]])]))
        incoming = {place: _accept(mesh, place) for place in sources}
        outgoing = {}
        for place, (descriptor, _) in offers.items():
            if mesh.receive(place, torch.empty(1, dtype=torch.bool)).item():
                outgoing[place] = SharedPipe(descriptor, capacities[place], sends=True)
    finally:
        for descriptor, _ in offers.values():
            if descriptor >= 0:
                os.close(descriptor)
    return outgoing, {place: pipe for place, pipe in incoming.items() if pipe is not None}


def _capacity(sizes: Sequence[int]) -> int:
    """The power of two that holds such tensors, within bounds."""
    num_bytes = sum(size + _HEADER_BYTES for size in sizes)
    return min(max(_LEAST_BYTES, 1 << num_bytes.bit_length()), _MOST_BYTES)


def _offer(capacity: int) -> tuple[int, Tensor]:
    if not load_kernel():
        return -1, no_ticket()
    return create_memory("pipe", torch.classes.shardline.SharedPipe.num_bytes(capacity))


def _accept(mesh: Mesh, place: Place) -> SharedPipe | None:
    """The end of what another stage offers, if it can be opened here; either way that is told."""
    offered = mesh.receive(place, torch.cat([no_ticket(), torch.zeros(1, dtype=torch.int64)]))
    descriptor, pipe = open_memory(offered[:-1]) if load_kernel() else -1, None
    if descriptor >= 0:
        pipe = SharedPipe(descriptor, int(offered[-1]), sends=False)
        os.close(descriptor)
    mesh.send(place, torch.tensor([pipe is not None]))
    return pipe
