"""Requests that wait, in the policy's order. `num_tokens` counts the tokens of all of them."""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from .policy import Key, Policy
from .request import Request, RequestState


class WaitingQueue:
    """A heap; who leaves from the middle is dropped later, so every operation is O(log n)."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[tuple[Key, int, Request]] = []
        self._num_dropped = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_dropped

    def __iter__(self) -> Iterator[Request]:
        return (entry[2] for entry in self._heap if self._is_current(entry))

    def push(self, request: Request) -> None:
        """Put a WAITING request at its place."""
        self.num_tokens += len(request.token_ids)
        heappush(self._heap, (self._policy.key(request), request.sequence, request))

    def peek(self) -> Request:
        """The first request; the queue is not empty."""
        while not self._is_current(self._heap[0]):
            heappop(self._heap)
            self._num_dropped -= 1
        return self._heap[0][2]

    def pop(self) -> Request:
        """Take the first request out; the queue is not empty."""
        request = self.peek()
        heappop(self._heap)
        self.num_tokens -= len(request.token_ids)
        return request

    def move(self, request: Request) -> None:
        """Its key has changed while it waits."""
        heappush(self._heap, (self._policy.key(request), request.sequence, request))
        self._drop_one()

    def drop(self, request: Request) -> None:
        """Take out a request of this queue that has just stopped being WAITING."""
        assert request.state is not RequestState.WAITING
        self.num_tokens -= len(request.token_ids)
        self._drop_one()

    def _drop_one(self) -> None:
        self._num_dropped += 1
        # Dropped requests hold their tokens; a queue that stands still must not collect them.
        if self._num_dropped * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapify(self._heap)
            self._num_dropped = 0

    def _is_current(self, entry: tuple[Key, int, Request]) -> bool:
        key, _, request = entry
        return request.state is RequestState.WAITING and key == self._policy.key(request)
