"""Collectives made of messages, where the ranks of a stage are on several nodes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardline_shards.layout import Place
from shardline_shards.mesh import Mesh


class ExchangeCollectives:
    """Every rank sends its tensor to all others, and adds what it gets in the order of ranks: the
    sum has the same bits everywhere. Raises LostPeer.
    """

    def __init__(self, mesh: Mesh, places: Sequence[Place], rank: int) -> None:
        self._mesh = mesh
        self._places = places
        self.rank = rank
        self.size = len(places)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have the same shape and dtype, in the order of ranks."""
        if not tensor.numel():
            return [tensor] * self.size
        for place in self._others():
            self._mesh.send(place, tensor)
        parts = {place: self._mesh.receive(place, _room_like(tensor)) for place in self._others()}
        return [parts.get(place, tensor) for place in self._places]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in the order of ranks, accumulated in fp32."""
        parts = self.all_gather(tensor)
        total = parts[0].to(torch.float32)
        for part in parts[1:]:
            total = total + part
        return total.to(tensor.dtype)

    def gather_last_dim(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Concatenate over ranks on rank 0; other ranks get their own part back."""
        if self.rank != 0:
            if tensor.numel():
                self._mesh.send(self._places[0], tensor)
            return tensor
        parts = [tensor] + [tensor.new_empty(*tensor.shape[:-1], size) for size in sizes[1:]]
        for place, part in zip(self._others(), parts[1:], strict=True):
            if part.numel():
                self._mesh.receive(place, part)
        return torch.cat(parts, dim=-1)

    def _others(self) -> list[Place]:
        return [place for rank, place in enumerate(self._places) if rank != self.rank]


def _room_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)
