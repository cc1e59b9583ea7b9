"""What one worker uses to reach others: its stage's collectives, and the links between stages."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import zmq
from torch import Tensor

from shardline_shards.collectives import Collectives, SingleRank, StageCollectives
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.ledger import Ledger


class StageLink(Protocol):
    """The way to a neighbouring stage. Sends do not wait for the receiver. Raises LostPeer."""

    def send(self, hidden: Tensor) -> None:
        """Hand on hidden states, which do not change any more."""

    def begin_receive(
        self, num_tokens: int, width: int, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """Let hidden states [num_tokens, width] come in meanwhile; the result waits for them."""


class Communicators(ABC):
    """All ways to others are made at once, none later, and anew in every generation.

    `drawn` is the way of tokens from the rank that draws them to rank 0 of the first stage, if that
    is another one and `shares_drawn`; both have it. `link_bytes` is the most that a step hands on,
    and `max_in_flight` how many steps there can be at once.
    """

    previous: StageLink | None = None
    next: StageLink | None = None
    drawn: StageLink | None = None
    link_bytes = 0

    def __init__(
        self, layout: ParallelLayout, place: Place, ledger: Ledger, shares_drawn: bool
    ) -> None:
        self.layout = layout
        self.place = place
        self.ledger = ledger
        self.max_in_flight = layout.pp + 1
        self._shares_drawn = shares_drawn and layout.pp > 1
        self._stage = StageCollectives(place.tp_rank, layout.tp, ledger) if layout.tp > 1 else None

    @property
    def collectives(self) -> Collectives:
        """The same object for as long as this worker lives, whatever generations come and go."""
        return self._stage or SingleRank()

    @abstractmethod
    def open(self, generation: int) -> str | None:
        """Be there for a new generation; returns the address that others have to know."""

    @abstractmethod
    def form(self, addresses: Sequence[str | None]) -> None:
        """Meet all other ranks, at what each of them has opened. Raises LostPeer if one of them
        goes meanwhile.
        """

    def abandon(self) -> None:
        """Hang up without asking anybody, because a rank is gone; who waits for this one is woken,
        and does the same: so all survivors get out, one after the other.
        """
        self.previous = self.next = self.drawn = None
        if self._stage is not None:
            self._stage.abandon()

    @abstractmethod
    def close(self) -> None:
        """Leave together: a rank that leaves early breaks what others still receive."""

    def _ends_of_drawn(self) -> list[Place]:
        """Who draws tokens and who needs them, if they are shared: the same on all ranks."""
        return [Place(self.layout.pp - 1, 0), Place(0, 0)] if self._shares_drawn else []

    def _across(self) -> Place | None:
        """The other end of the way of drawn tokens, on its ends."""
        ends = self._ends_of_drawn()
        return ends[1 - ends.index(self.place)] if self.place in ends else None

    @property
    def num_dropped(self) -> int:
        """What came here since the start that no other worker has sent."""
        return 0

    @property
    def connections(self) -> zmq.Socket[Any] | None:
        """Readable when `num_dropped` may have changed."""
        return None
