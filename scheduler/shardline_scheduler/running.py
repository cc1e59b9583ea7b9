"""Requests that run, and what each of them can do next."""

from collections import deque
from collections.abc import Iterable, Iterator

from .request import Request
from .terms import Rank

_PROMISED = Rank.PROMISED
# Tokens of a request, where steps are planned ahead.
_MOST_IN_FLIGHT = 2


class RunningRequests:
    """By request_index. Each is a prefill (more to compute than one token), a decode whose next
    token can be planned, or waits for a token.

    With `plans_ahead` the next one can be planned while one token is in flight, unless that may
    end the request: never beyond max_tokens, and not while it has a strike, since the next step
    would be one of those that it could take down.
    """

    def __init__(self, *, plans_ahead: bool = False) -> None:
        self._plans_ahead = plans_ahead
        self._requests: dict[int, Request] = {}
        self._prefills: dict[int, Request] = {}
        # Oldest token first, promised requests and guests. Who stops running stays in here until
        # his turn comes: indexes are never used twice, so he is known by it.
        self._decodes: tuple[deque[int], deque[int]] = (deque(), deque())
        self._num_promised_decodes = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    @property
    def num_decodes(self) -> int:
        """Requests with nothing but their next token to compute, or with that in flight."""
        return len(self._requests) - len(self._prefills)

    @property
    def num_promised_decodes(self) -> int:
        """Those of them whose budget is promised to be kept."""
        return self._num_promised_decodes

    @property
    def num_prefills(self) -> int:
        """Requests with more to compute than one token."""
        return len(self._prefills)

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
        if self._prefills.pop(request.request_index, None) is None and request.terms.is_promised:
            self._num_promised_decodes -= 1

    def end_prefill(self, request: Request) -> None:
        """All of its tokens are planned; the next one is in flight."""
        del self._prefills[request.request_index]
        if request.terms.is_promised:
            self._num_promised_decodes += 1
        self._queue_ahead(request)

    def begin_promise(self, request: Request) -> None:
        """A running guest is promised something."""
        index, (promised, guests) = request.request_index, self._decodes
        if index in self._prefills:
            return
        self._num_promised_decodes += 1
        if self._is_queued(request):
            guests.remove(index)
            promised.append(index)

    def end_promise(self, request: Request) -> None:
        """A running request becomes a guest."""
        index, (promised, guests) = request.request_index, self._decodes
        if index in self._prefills:
            return
        self._num_promised_decodes -= 1
        if self._is_queued(request):
            promised.remove(index)
            guests.append(index)

    def take_tokens(self, requests: Iterable[Request]) -> None:
        """Their tokens are back, and they go on, without strikes; they are the youngest."""
        promised, guests = self._decodes
        plans_ahead = self._plans_ahead
        for request in requests:
            had_strikes, request.num_strikes = request.num_strikes, 0
            # Ahead, it is in the queue already if nothing but this token was in flight. Otherwise
            # of what `may_plan_ahead` asks, only the end is still open here.
            if plans_ahead and not (
                (request.num_tokens_in_flight or had_strikes)
                and request.num_computed_tokens < request.num_computable_tokens
            ):
                continue
            decodes = promised if request.terms.rank is _PROMISED else guests
            decodes.append(request.request_index)

    def follow(self, decodes: Iterable[Request]) -> None:
        """A step has taken these, and is complete but for prompts."""
        if self._plans_ahead:
            for request in decodes:
                if request.num_tokens_in_flight < _MOST_IN_FLIGHT:
                    self._queue_ahead(request)

    def _queue_ahead(self, request: Request) -> None:
        if self._plans_ahead and may_plan_ahead(request):
            self._decodes[request.terms.rank is not _PROMISED].append(request.request_index)

    def _is_queued(self, decode: Request) -> bool:
        return may_plan_ahead(decode) if self._plans_ahead else not decode.is_token_in_flight

    def pop_decodes(self, num_wanted: int, guest: bool) -> list[Request]:
        """Of those promised or of the guests, the decodes whose tokens have been back for longest;
        as many as are wanted and there.
        """
        decodes, find = self._decodes[guest], self._requests.get
        popped: list[Request] = []
        while decodes and (num_missing := num_wanted - len(popped)) > 0:
            indexes = _pop_first(decodes, num_missing)
            popped += [request for index in indexes if (request := find(index)) is not None]
        return popped

    def put_back(self, decodes: Iterable[Request], *, guest: bool) -> None:
        """Decodes that were popped in this order and could not be planned."""
        indexes = [request.request_index for request in decodes]
        self._decodes[guest].extendleft(reversed(indexes))

    def check(self) -> None:
        """Assert that everybody is in one place, so that his turn comes."""
        queued = (*self._decodes[False], *self._decodes[True])
        decodes = [index for index in queued if index in self._requests]
        awaiting = [
            index
            for index, request in self._requests.items()
            if request.is_token_in_flight and not self._is_queued(request)
        ]
        assert sorted([*self._prefills, *decodes, *awaiting]) == sorted(self._requests), (
            f"prefills {[*self._prefills]}, decodes {decodes} and awaiting {awaiting} "
            f"are not the running {[*self._requests]}"
        )
        promised = [r for i, r in self._requests.items() if i not in self._prefills]
        num_promised = sum(request.terms.is_promised for request in promised)
        assert self._num_promised_decodes == num_promised, "promised decodes are miscounted"


def _pop_first(queue: deque[int], count: int) -> list[int]:
    if count < len(queue):
        return [queue.popleft() for _ in range(count)]
    first = list(queue)
    queue.clear()
    return first


def may_plan_ahead(request: Request) -> bool:
    """Whether the token after the one in flight may be planned."""
    num_ahead = request.num_tokens_in_flight
    return (
        num_ahead < _MOST_IN_FLIGHT
        and request.num_computed_tokens < request.num_computable_tokens
        and not (num_ahead and request.num_strikes)
    )
