"""A worker's end of the control channel."""

import logging
from typing import Any
from zlib import crc32

import zmq

from shardline_shards.channel import Endpoint, Unreadable, connect, read
from shardline_shards.messages import Dropped, FromWorker, ToWorker, decode_to_worker, encode

logger = logging.getLogger("shardline.worker")


class EngineChannel:
    """Where the engine's messages come, and the worker's leave."""

    def __init__(self, engine: Endpoint, name: bytes) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, name)
        self._socket.setsockopt(zmq.LINGER, 1000)
        connect(self._socket, engine)
        self.checksum = 0

    def send(self, message: FromWorker) -> None:
        """Queue a message for the engine."""
        self._socket.send(encode(message))

    def has_message(self, within_ms: int | None, or_else: zmq.Socket[Any] | None) -> bool:
        """Wait until the engine has said something; False if that time has passed before, or the
        other socket has become readable.
        """
        sockets = [self._socket] if or_else is None else [self._socket, or_else]
        ready, _, _ = zmq.select(sockets, [], [], None if within_ms is None else within_ms / 1000)
        return self._socket in ready

    def receive(self) -> ToWorker:
        """Wait for the engine's next message; `checksum` is of its bytes, the same to all ranks.

        What cannot be read is dropped, and the engine told so.
        """
        while True:
            frames = self._socket.recv_multipart()
            try:
                message = read(decode_to_worker, frames)
            except Unreadable as error:
                logger.warning("dropped what the engine sent: %s", error)
                self.send(Dropped("worker", 1))
                continue
            self.checksum = crc32(frames[0])
            return message

    def close(self) -> None:
        """Send what is queued, then leave."""
        self._socket.close()
        zmq.Context.instance().term()
