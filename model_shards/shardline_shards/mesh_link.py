"""The way to a neighbouring stage on CPUs: shared memory, or else messages of the mesh."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from shardline_shards.collectives import brief
from shardline_shards.errors import LostPeer
from shardline_shards.layout import Place
from shardline_shards.ledger import Ledger, Operation
from shardline_shards.mesh import Mesh
from shardline_shards.shared_pipe import SharedPipe


class MeshLink:
    """A StageLink; `is_shared` if all ranks of the stage have one like it."""

    def __init__(
        self,
        mesh: Mesh,
        peer: Place,
        pipe: SharedPipe | None,
        ledger: Ledger,
        *,
        is_shared: bool = True,
    ) -> None:
        self._mesh = mesh
        self._peer = peer
        self.pipe = pipe
        self._ledger = ledger
        self._is_shared = is_shared

    def send(self, hidden: Tensor) -> None:
        """As for all links; what goes by messages is kept until it has left."""
        self._ledger.note(Operation.SEND, hidden.shape, is_shared=self._is_shared)
        if self.pipe is None:
            self._mesh.send(self._peer, hidden)
        else:
            with self._noticing_loss():
                self.pipe.send(hidden)

    def begin_receive(
        self, num_tokens: int, width: int, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """They come in by themselves; only the wait for them is left."""

        def wait() -> Tensor:
            self._ledger.note(Operation.RECEIVE, (num_tokens, width), is_shared=self._is_shared)
            into = torch.empty(num_tokens, width, dtype=dtype)
            if self.pipe is None:
                return self._mesh.receive(self._peer, into)
            with self._noticing_loss():
                return self.pipe.receive(into)

        return wait

    def leave(self) -> None:
        """Let the other end go if it waits for this one."""
        if self.pipe is not None:
            self.pipe.leave()

    @contextmanager
    def _noticing_loss(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise LostPeer(f"the connection to {self._peer} broke ({brief(error)})") from error
