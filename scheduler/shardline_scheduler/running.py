"""Requests that run, and what each of them can do next."""

from collections import deque
from collections.abc import Iterable, Iterator

from .request import Request


class RunningRequests:
    """By request_index. Each is a prefill (more to compute than one token), a decode whose token
    is back, or waits for its token.
    """

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        self._prefills: dict[int, Request] = {}
        # Oldest token first. Who stops running stays in here until his turn comes: indexes are
        # never used twice, so he is known by it.
        self._decodes: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    @property
    def num_decodes(self) -> int:
        """Requests with nothing but their next token to compute, or with that in flight."""
        return len(self._requests) - len(self._prefills)

    def get(self, request_index: int) -> Request | None:
        """The request that now runs under this index, if one does."""
        return self._requests.get(request_index)

    def prefills(self) -> list[Request]:
        """In the order in which they were admitted."""
        return list(self._prefills.values())

    def add(self, request: Request) -> None:
        """A request that has just been admitted."""
        self._requests[request.request_index] = request
        self._prefills[request.request_index] = request

    def remove(self, request: Request) -> None:
        """A request that has finished, or has to step back."""
        del self._requests[request.request_index]
        self._prefills.pop(request.request_index, None)

    def end_prefill(self, request: Request) -> None:
        """All of its tokens are planned; the next one is in flight."""
        del self._prefills[request.request_index]

    def push_decode(self, request: Request) -> None:
        """Its token is back; it is the youngest."""
        self._decodes.append(request.request_index)

    def pop_decode(self) -> Request | None:
        """The decode whose token has been back for longest."""
        while self._decodes:
            request = self._requests.get(self._decodes.popleft())
            if request is not None:
                return request
        return None

    def put_back(self, decodes: Iterable[Request]) -> None:
        """Decodes that were popped in this order and could not be planned."""
        self._decodes.extendleft([request.request_index for request in decodes][::-1])

    def check(self) -> None:
        """Assert that everybody is in one place, so that his turn comes."""
        decodes = [index for index in self._decodes if index in self._requests]
        awaiting = [
            index for index, request in self._requests.items() if request.is_token_in_flight
        ]
        assert sorted([*self._prefills, *decodes, *awaiting]) == sorted(self._requests), (
            f"prefills {[*self._prefills]}, decodes {decodes} and awaiting {awaiting} "
            f"are not the running {[*self._requests]}"
        )
