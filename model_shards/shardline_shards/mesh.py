"""Tensors between workers that compute on CPUs, as messages that only those of one launch can send.

Every worker listens at its own address, and connects to each one that it exchanges tensors with.
What it sends leaves by its own connection; the end of that one tells that the peer has gone.
"""

import time
from collections import deque
from collections.abc import Mapping

import torch
import zmq
from torch import Tensor

from shardline_shards.channel import Endpoint, connect, monitor
from shardline_shards.errors import LostPeer
from shardline_shards.gate import Gate, Listener
from shardline_shards.layout import Place

# Workers meet when all have said that they are there: who does not come soon has died meanwhile.
_FORM_LIMIT_S = 10.0
# For what another worker is awaited within a step; who is stuck is found out long before.
_STEP_LIMIT_S = 300.0
_ENDS = (
    zmq.Event.DISCONNECTED
    | zmq.Event.CLOSED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)
_GREETING = b""  # a tensor without elements is never sent


class Mesh:
    """One worker's ways to others, in one generation of the launch.

    What a peer sends arrives in the order in which it was sent, and nobody waits to send. Messages
    of whoever is no peer, or of another generation, are dropped and counted.
    """

    def __init__(self, gate: Gate, host: str, place: Place, generation: int) -> None:
        self._gate = gate
        self._generation = generation
        self._own_name = self._name_of(place)
        self._listener = Listener(gate, host, bytes)
        self._peers: dict[Place, _Peer] = {}
        self._by_name: dict[bytes, _Peer] = {}
        self._num_unknown = 0
        self._poller = zmq.Poller()
        self._poller.register(self._listener.socket, zmq.POLLIN)

    @property
    def address(self) -> str:
        """Where peers reach this worker."""
        return self._listener.endpoint.address

    @property
    def num_dropped(self) -> int:
        """Messages that no peer has sent, and connections of strangers."""
        return self._listener.num_dropped + self._num_unknown

    @property
    def connections(self) -> zmq.Socket[bytes]:
        """Readable when connections have come or gone that `num_dropped` does not know of yet."""
        return self._listener.connections

    def meet(self, addresses: Mapping[Place, str]) -> None:
        """Connect to all peers, and wait until they have done the same. Raises LostPeer."""
        for place, address in addresses.items():
            endpoint = Endpoint(address=address, keys=self._gate.keys.client)
            peer = _Peer(self._gate, endpoint, place, self._own_name)
            self._peers[place] = self._by_name[self._name_of(place)] = peer
            self._poller.register(peer.events, zmq.POLLIN)
        self._greet_all()

    def part(self) -> None:
        """Leave when all peers do: until then they may still have to receive. Raises LostPeer."""
        self._greet_all()

    def send(self, place: Place, tensor: Tensor) -> None:
        """Hand a tensor to a peer; it must not change any more. Raises LostPeer."""
        self._peers[place].send(_bytes_of(tensor.contiguous()))

    def receive(self, place: Place, into: Tensor) -> Tensor:
        """Wait for the next tensor of a peer; `into` has its shape and dtype. Raises LostPeer."""
        content, target = self._next(self._peers[place], _STEP_LIMIT_S), _bytes_of(into)
        if len(content) != len(target):
            raise LostPeer(f"{place} sent {len(content)} bytes where {len(target)} are due")
        target[:] = content
        return into

    def close(self, linger_ms: int = 0) -> None:
        """Hang up; what has not left yet may do so for that long."""
        for peer in self._peers.values():
            peer.close(linger_ms)
        self._listener.close(linger_ms=0)

    def _name_of(self, place: Place) -> bytes:
        return f"{place.stage_index}.{place.tp_rank}.{self._generation}".encode()

    def _greet_all(self) -> None:
        for peer in self._peers.values():
            peer.send(_GREETING)
        for peer in self._peers.values():
            self._next(peer, _FORM_LIMIT_S)

    def _next(self, peer: "_Peer", limit_s: float) -> bytes:
        deadline = time.monotonic() + limit_s
        while not peer.arrived:
            if peer.is_lost:
                raise peer.loss()
            if (left_s := deadline - time.monotonic()) <= 0:
                raise LostPeer(f"nothing has come from {peer.place} for {limit_s:.0f} s")
            self._take_in(left_s)
        return peer.arrived.popleft()

    def _take_in(self, within_s: float) -> None:
        """Wait until something comes or somebody goes, and keep it for when it is asked for."""
        ready = {socket for socket, _ in self._poller.poll(int(within_s * 1000))}
        for peer in self._peers.values():
            if peer.events in ready:
                peer.is_lost = True
                self._poller.unregister(peer.events)
        while (received := self._listener.receive()) is not None:
            name, content = received
            if name in self._by_name:
                self._by_name[name].arrived.append(content)
            else:
                self._num_unknown += 1


class _Peer:
    """The connection to another worker, and what has come from it."""

    def __init__(self, gate: Gate, endpoint: Endpoint, place: Place, own_name: bytes) -> None:
        self.place = place
        self.arrived: deque[bytes] = deque()
        self.is_lost = False
        self._socket: zmq.Socket[bytes] = gate.context.socket(zmq.DEALER)
        self._socket.identity = own_name
        self._socket.set_hwm(0)
        self._socket.reconnect_ivl = -1  # what has broken is made anew in the next generation
        self.events = monitor(self._socket, _ENDS)
        connect(self._socket, endpoint)

    def send(self, content: bytes | memoryview) -> None:
        if self.is_lost:
            raise self.loss()
        try:
            self._socket.send(content, zmq.NOBLOCK, copy=False)
        except zmq.Again as error:  # no connection is left that it could wait for
            raise self.loss() from error

    def loss(self) -> LostPeer:
        return LostPeer(f"the connection to {self.place} broke")

    def close(self, linger_ms: int) -> None:
        self._socket.disable_monitor()
        self.events.close(linger=0)
        self._socket.close(linger=linger_ms)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, which it keeps."""
    content: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return content
