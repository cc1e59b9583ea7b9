"""Communicators of workers that compute on CPUs: shared memory, or else encrypted messages."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import zmq

from shardline_shards.channel import ClientKeys
from shardline_shards.communicators import Communicators
from shardline_shards.errors import LostPeer
from shardline_shards.exchange import ExchangeCollectives
from shardline_shards.gate import Gate, LaunchKeys
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.ledger import Ledger
from shardline_shards.mesh import Mesh
from shardline_shards.mesh_link import MeshLink
from shardline_shards.shared_memory import share_memory
from shardline_shards.shared_pipe import share_pipes

_LINGER_MS = 1000


class MeshCommunicators(Communicators):
    """A fresh mesh, on a fresh port, for every generation. A worker without others has none."""

    def __init__(
        self,
        layout: ParallelLayout,
        place: Place,
        ledger: Ledger,
        host: str,
        keys: ClientKeys,
        *,
        shares_drawn: bool = False,
    ) -> None:
        super().__init__(layout, place, ledger, shares_drawn)
        self._host = host
        self._gate = Gate(LaunchKeys.among_clients(keys)) if layout.world_size > 1 else None
        self._mesh: Mesh | None = None
        self._num_dropped_before = 0

    def open(self, generation: int) -> str | None:
        """Listen; returns this worker's own address."""
        if self._gate is None:
            return None
        self._mesh = Mesh(self._gate, self._host, self.place, generation)
        return self._mesh.address

    def form(self, addresses: Sequence[str | None]) -> None:
        """Connect to the other ranks of this stage and to the neighbouring stages."""
        if (mesh := self._mesh) is None:
            return
        mesh.meet({place: str(addresses[self.layout.rank(place)]) for place in self._peers()})
        if self._stage is not None:
            exchange = ExchangeCollectives(mesh, self._own_stage(), self.place.tp_rank)
            self._stage.form(share_memory(exchange) or exchange)
        self._form_links(mesh)

    def _form_links(self, mesh: Mesh) -> None:
        before, after, across = self._neighbour(-1), self._neighbour(+1), self._across()
        draws = self.layout.is_last(self.place)
        # One more than can be in flight, so that nobody waits to send.
        to = {} if after is None else {after: [self.link_bytes] * (self.max_in_flight + 1)}
        sources = [] if before is None else [before]
        if across is not None and draws:
            to[across] = []
        elif across is not None:
            sources.append(across)
        outgoing, incoming = share_pipes(mesh, to, sources)
        if before is not None:
            self.previous = MeshLink(mesh, before, incoming.get(before), self.ledger)
        if after is not None:
            self.next = MeshLink(mesh, after, outgoing.get(after), self.ledger)
        if across is not None:
            pipe = (outgoing if draws else incoming).get(across)
            self.drawn = MeshLink(mesh, across, pipe, self.ledger, is_shared=False)

    def abandon(self) -> None:
        """As for all communicators."""
        for link in (self.previous, self.next, self.drawn):
            if isinstance(link, MeshLink):
                link.leave()
        super().abandon()
        self._leave(linger_ms=0)

    def close(self) -> None:
        """When all peers do; those that are gone need nothing more."""
        if self._mesh is not None:
            with suppress(LostPeer):
                self._mesh.part()
            self._leave(_LINGER_MS)
        if self._gate is not None:
            self._gate.close()

    @property
    def num_dropped(self) -> int:
        """Of all generations."""
        return self._num_dropped_before + (self._mesh.num_dropped if self._mesh is not None else 0)

    @property
    def connections(self) -> zmq.Socket[Any] | None:
        """Of this generation's mesh."""
        return None if self._mesh is None else self._mesh.connections

    def _leave(self, linger_ms: int) -> None:
        self._num_dropped_before = self.num_dropped
        if self._mesh is not None:
            self._mesh.close(linger_ms)
            self._mesh = None

    def _own_stage(self) -> list[Place]:
        return [self.layout.place(rank) for rank in self.layout.stage_ranks(self.place.stage_index)]

    def _peers(self) -> list[Place]:
        """Everyone that this worker exchanges tensors with."""
        others = [self._neighbour(-1), self._neighbour(+1), *self._own_stage(), self._across()]
        known = dict.fromkeys(place for place in others if place is not None)
        return [place for place in known if place != self.place]

    def _neighbour(self, distance: int) -> Place | None:
        stage_index = self.place.stage_index + distance
        is_there = 0 <= stage_index < self.layout.pp
        return Place(stage_index, self.place.tp_rank) if is_there else None
