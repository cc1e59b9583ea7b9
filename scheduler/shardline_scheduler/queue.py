"""Requests that wait, in the policy's order."""

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

    def __len__(self) -> int:
        return len(self._heap) - self._num_dropped

    def __iter__(self) -> Iterator[Request]:
        return (request for _, _, request in self._heap if request.state is RequestState.WAITING)

    def push(self, request: Request) -> None:
        """Put a WAITING request at its place."""
        key = self._policy.waiting_key(request)
        heappush(self._heap, (key, request.sequence, request))

    def peek(self) -> Request:
        """The first request; the queue is not empty."""
        while self._heap[0][2].state is not RequestState.WAITING:
            heappop(self._heap)
            self._num_dropped -= 1
        return self._heap[0][2]

    def pop(self) -> Request:
        """Take the first request out; the queue is not empty."""
        request = self.peek()
        heappop(self._heap)
        return request

    def drop(self, request: Request) -> None:
        """Take out a request of this queue that has just stopped being WAITING."""
        assert request.state is not RequestState.WAITING
        self._num_dropped += 1
        # Dropped requests hold their tokens; a queue that stands still must not collect them.
        if self._num_dropped * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].state is RequestState.WAITING]
            heapify(self._heap)
            self._num_dropped = 0
