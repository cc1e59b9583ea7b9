"""Head and nodes look after each other: each says every half second that it is there.

What a network cut would leave hanging for minutes is noticed here within seconds. A shorter one is
outlived: TCP waits as long again before it sends once more what a cut has swallowed, and twice that
the next time, so a beat that nobody answers makes a new connection.
"""

import logging
import time
from collections.abc import Callable, Sequence

import msgspec
import zmq
from msgspec import Struct

from shardline_server.child import ChildExits
from shardline_server.local_workers import Death, WorkerState
from shardline_shards.channel import Endpoint, Unreadable, connect, read
from shardline_shards.gate import Gate, Listener
from shardline_shards.layout import Place
from shardline_shards.ledger import Entry

logger = logging.getLogger("shardline.node")

SILENCE_LIMIT_S = 4.0
BEAT_INTERVAL_S = 0.5
_RECONNECT_AFTER_MS = 1000  # of silence
_CONNECT_LIMIT_MS = 500


class Beat(Struct, frozen=True, tag=True):
    """A node is there, and so are its workers; `num_dropped` messages it could not read. If it was
    `told_to_leave` by a signal, it waits for the head to let requests finish first.
    """

    workers: list[WorkerState] = []
    num_dropped: int = 0
    told_to_leave: bool = False


class Answer(Struct, frozen=True, tag=True):
    """The head is there; with `leave` the node shall end its workers, and itself.

    Workers that have been `restarted` are of that generation; a node whose own are older starts
    them anew. If it `keeps_spare`, a process waits there to take a dead worker's place.
    """

    leave: bool = False
    restarted: list[tuple[Place, int]] = []
    keeps_spare: bool = False


class NodeWatch:
    """The head's side. Nodes are known by the names that they joined with."""

    def __init__(self, gate: Gate, host: str) -> None:
        decode: Callable[[bytes], Beat] = msgspec.msgpack.Decoder(Beat).decode
        self._listener = Listener(gate, host, decode)
        # Of a node's connections the newest is the one, though an older one may not be known dead.
        self._listener.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.endpoint = self._listener.endpoint
        self._heard: dict[str, float] = {}
        self._states: dict[Place, tuple[str, WorkerState]] = {}
        self._restarted: dict[Place, int] = {}
        self._dropped_by: dict[str, int] = {}
        self._told_to_leave: str | None = None
        self.keeps_spare = False

    @property
    def num_dropped(self) -> int:
        """Messages that could not be read, here and by the nodes, and strangers."""
        return self._listener.num_dropped + sum(self._dropped_by.values())

    def expect(self, names: list[str]) -> None:
        """From now on these nodes must be heard."""
        self._heard = dict.fromkeys(names, time.monotonic())

    def find_failure(self) -> str | None:
        """Answer the beats that have come; whether a node has fallen silent."""
        while (received := self._listener.receive()) is not None:
            identity, beat = received
            name = identity.decode(errors="replace")
            if name in self._heard:
                self._heard[name] = time.monotonic()
                self._dropped_by[name] = beat.num_dropped
                if beat.told_to_leave:
                    self._told_to_leave = f"node {name} was told to leave"
                self._states |= {state.place: (name, state) for state in beat.workers}
                self._send(name, self._answer())
        return self._find_silent()

    def find_leaving(self) -> str | None:
        """Whether a node was told to leave, and which."""
        return self._told_to_leave

    def entries(self) -> dict[Place, Entry | None]:
        """What the nodes' workers are at."""
        return {state.place: state.entry for _, state in self._current()}

    def states(self) -> dict[Place, WorkerState]:
        """What the nodes have told of their workers."""
        return {state.place: state for _, state in self._current()}

    def ended(self) -> list[Death]:
        """The nodes' workers that have ended."""
        return [
            Death(state.place, state.how, state.entry, name)
            for name, state in self._current()
            if state.how is not None
        ]

    def stopped(self) -> list[Place]:
        """The nodes' workers whose process is stopped."""
        return [state.place for _, state in self._current() if state.is_stopped]

    def restart(self, places: Sequence[Place], generation: int) -> None:
        """Have workers started anew, where they are; nodes have no spare for a while."""
        self._restarted |= dict.fromkeys(places, generation)
        self.keeps_spare = False
        for name in self._heard:
            self._send(name, self._answer())

    def _answer(self) -> Answer:
        return Answer(restarted=list(self._restarted.items()), keeps_spare=self.keeps_spare)

    def _current(self) -> list[tuple[str, WorkerState]]:
        """Without what is told of those that have successors."""
        return [
            (name, state)
            for name, state in self._states.values()
            if state.generation >= self._restarted.get(state.place, 0)
        ]

    def dismiss(self) -> None:
        """Tell every node to leave."""
        for name in self._heard:
            self._send(name, Answer(leave=True))
        self._listener.close(linger_ms=1000)

    def _find_silent(self) -> str | None:
        for name, heard in self._heard.items():
            silence_s = time.monotonic() - heard
            if silence_s > SILENCE_LIMIT_S:
                return f"node {name} has not been heard for {silence_s:.1f} s"
        return None

    def _send(self, name: str, answer: Answer) -> None:
        self._listener.send(name.encode(), msgspec.msgpack.encode(answer))


class HeadWatch:
    """A node's side."""

    def __init__(self, head: Endpoint, name: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, int(BEAT_INTERVAL_S * 1000))
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _RECONNECT_AFTER_MS)
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_LIMIT_MS)
        connect(self._socket, head)
        self._decode: Callable[[bytes], Answer] = msgspec.msgpack.Decoder(Answer).decode
        self._heard = time.monotonic()
        self.answer = Answer()
        self._num_dropped = 0

    @property
    def silence_s(self) -> float:
        """For how long the head has not been heard."""
        return time.monotonic() - self._heard

    def beat(self, workers: list[WorkerState], exits: ChildExits, *, told_to_leave: bool) -> None:
        """Say how we are, and wait out the interval; less if a worker ends, or if the head's last
        `answer` is news.
        """
        self._socket.send(msgspec.msgpack.encode(Beat(workers, self._num_dropped, told_to_leave)))
        end = time.monotonic() + BEAT_INTERVAL_S
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(exits.fileno(), zmq.POLLIN)
        before = self.answer
        while self.answer == before:
            ready = dict(poller.poll(max(0, int((end - time.monotonic()) * 1000))))
            if self._socket in ready:
                self._receive()
            elif not ready or exits.fileno() in ready:
                break
        exits.clear()

    def _receive(self) -> None:
        try:
            self.answer = read(self._decode, self._socket.recv_multipart())
        except Unreadable as error:
            self._num_dropped += 1
            logger.warning("dropped what the head sent: %s", error)
        else:
            self._heard = time.monotonic()

    def close(self) -> None:
        """Send what is queued, for a second at most."""
        self._socket.close(linger=1000)
