"""Tokens that a step reads before the engine knows them, on their way from where they are drawn.

Rank 0 of the last stage draws tokens, and the first stage's ranks need them as input. Of one stage
that is rank 0 itself; of several, what each step draws is sent to rank 0 of the first. Either way
that one shares with the other ranks of its stage what they need.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardline_scheduler.plan import LAST_DRAWN, StepPlan
from shardline_shards.batch import RequestState, RequestTable, StepBatch
from shardline_shards.communicators import Communicators


@dataclass(frozen=True, slots=True)
class _Coming:
    """What a step draws, for the requests in this order."""

    request_indexes: list[int]
    wait: Callable[[], Tensor]


class DrawnTokens:
    """One worker's part in it, for as long as its ways to others last. Raises LostPeer."""

    def __init__(
        self, communicators: Communicators, requests: RequestTable, device: torch.device
    ) -> None:
        layout, place = communicators.layout, communicators.place
        self._link = communicators.drawn
        self._collectives = communicators.collectives
        self._requests = requests
        self._device = device
        self._num_stages = layout.pp
        self._is_first = layout.is_first(place)
        self._is_last = layout.is_last(place)
        self._coming: deque[_Coming] = deque()

    def fill_in(self, plan: StepPlan, batch: StepBatch) -> None:
        """Put tokens that others have drawn where `plan` leaves them open; may wait for them.

        The plan has been applied to the requests, and `batch` was made of it.
        """
        if not self._is_first or (self._num_stages == 1 and self._collectives.size == 1):
            return
        indexes, token_ids = plan.decodes.request_indexes, plan.decodes.token_ids
        rows = [row for row, token_id in enumerate(token_ids) if token_id == LAST_DRAWN]
        self._take_in([indexes[row] for row in rows])
        if rows:
            states = [self._requests[indexes[row]] for row in rows]
            tokens = self._share([state.last_drawn for state in states])
            self._put(batch, rows, states, tokens)
        self._expect(plan.drawing_indexes)

    def send(self, token_ids: Sequence[int]) -> None:
        """Where they were drawn: send them on their way, if the first stage is another one."""
        if self._link is not None and self._is_last and token_ids:
            self._link.send(self._tensor([[token_id] for token_id in token_ids]))

    def _expect(self, drawn: list[int]) -> None:
        """Let what this step draws for these requests come in meanwhile."""
        if self._link is not None and drawn:
            wait = self._link.begin_receive(len(drawn), 1, torch.int64)
            self._coming.append(_Coming(drawn, wait))

    def _take_in(self, indexes: list[int]) -> None:
        """Up to what was drawn for these requests last; and what is so old that nobody needs it,
        since the engine has it: no more than p steps before this one are in flight.
        """
        needed = set(indexes)
        counts = [n for n, c in enumerate(self._coming, 1) if needed & set(c.request_indexes)]
        for _ in range(max([len(self._coming) - self._num_stages, *counts])):
            coming = self._coming.popleft()
            tokens = coming.wait().flatten().tolist()
            for index, token_id in zip(coming.request_indexes, tokens, strict=True):
                if index in self._requests:
                    self._requests[index].last_drawn = token_id

    def _share(self, own: list[int]) -> list[int]:
        """Rank 0's, on all ranks of the stage. A sum is what every kind of collective has."""
        collectives = self._collectives
        if collectives.size == 1:
            return own
        if collectives.rank:
            own = [0] * len(own)
        # Of floats, which hold ids up to 2^24 exactly.
        shared = collectives.all_reduce(self._tensor(own, torch.float32))
        return [int(token_id) for token_id in shared.tolist()]

    def _put(
        self, batch: StepBatch, rows: list[int], states: list[RequestState], tokens: list[int]
    ) -> None:
        for state, token_id in zip(states, tokens, strict=True):
            assert token_id != LAST_DRAWN, "a token that nobody has drawn"
            state.token_ids[-1] = state.last_drawn = token_id
        batch.input_ids[rows] = self._tensor(tokens)  # a decode is one token, and they come first

    def _tensor(self, numbers: object, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=self._device)
