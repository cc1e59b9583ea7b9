"""Counts the connections to a socket that ended without having shown the launch's keys."""

import zmq
from zmq.utils.monitor import recv_monitor_message

from shardline_shards.channel import monitor

_EVENTS = zmq.Event.ACCEPTED | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED


class StrangerCount:
    """What ZMQ tells of a bound socket's connections, read when the count is asked for.

    Not every failed handshake is an event, but every connection's begin and end are, by its
    descriptor; so is a handshake that succeeds, though not whose. A connection that ends while it
    is not known whose handshakes succeeded counts as a stranger's, and some other one as a peer:
    the sum is right.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        """Before the socket is bound."""
        self._socket = socket
        self.events = monitor(socket, _EVENTS)
        self._open: set[int] = set()
        self._num_proven = 0
        self._num_strangers = 0

    def count(self) -> int:
        """How many have come and gone."""
        while self.events.poll(0):
            event = recv_monitor_message(self.events)
            self._note(event["event"], int(event["value"]))
        return self._num_strangers

    def close(self) -> None:
        """Before the socket is closed."""
        self._socket.disable_monitor()
        self.events.close(linger=0)

    def _note(self, event: int, descriptor: int) -> None:
        match event:
            case zmq.Event.ACCEPTED:
                self._open.add(descriptor)
            case zmq.Event.HANDSHAKE_SUCCEEDED:
                self._num_proven += 1
            case zmq.Event.DISCONNECTED if descriptor in self._open:
                self._open.remove(descriptor)
                self._num_strangers += 1
        if len(self._open) == self._num_proven:  # then it is known who they are
            self._open.clear()
            self._num_proven = 0
