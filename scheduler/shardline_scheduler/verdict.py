"""Whether one more request fits beside what is promised. Pure questions."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from math import inf
from typing import Protocol

from .capacity import Capacity, Pricing
from .cost import StepLoad
from .demand import Demand, Newcomer, Pace, Place
from .ledger import STEPS_PER_LIMIT
from .request import Request
from .terms import Terms


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is in flight: the next step can be planned in `next_s`, the last one is back in
    `back_s`, and those before it in `before_s`, newest first.
    """

    next_s: float = 0.0
    back_s: float = 0.0
    before_s: tuple[float, ...] = ()

    def wait_s(self, step_s: float, max_in_flight: int) -> float:
        """Until steps of `step_s` follow each other as in a pipe that has always done so. The first
        of them has to wait for the oldest of `max_in_flight` in flight, the next one for the next.
        """
        backs_s = (self.back_s, *self.before_s)[:max_in_flight]
        last = max_in_flight - 1
        return max(self.next_s, *(s - (last - i) * step_s for i, s in enumerate(backs_s)))


class KeptFor(Enum):
    """Whom place is kept for that nobody has been promised."""

    GUEST = auto()
    TENANTS = auto()
    URGENT = auto()


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A request at the door. `num_reserved` requests, a `reserved_share` of the time for prompts,
    and `num_reserved_blocks` of memory have to stay free beside it, for `kept_for`.
    """

    request: Request
    terms: Terms
    place: Place
    now: float
    num_cached_tokens: int
    ahead: Ahead
    num_reserved: int = 0
    reserved_share: float = 0.0
    num_reserved_blocks: int = 0
    kept_for: KeptFor | None = None

    @property
    def num_uncached_tokens(self) -> int:
        """Tokens that have to be computed for its first token."""
        return len(self.request.token_ids) - self.num_cached_tokens

    @property
    def newcomer(self) -> Newcomer:
        """Its part of the demand; due at infinity if it has no limit on its first token."""
        return Newcomer(self.place, self.terms.first_token_by, self.terms.prefill_s)


class Book(Protocol):
    """What is promised, now (a Ledger) or at a later time."""

    @property
    def num_tokens(self) -> int:
        """Of all prompts and outputs, as planned."""
        ...

    @property
    def num_blocks(self) -> int:
        """That they fill, each for itself."""
        ...

    @property
    def seconds_per_token(self) -> float:
        """The tightest limit."""
        ...

    @property
    def step_s(self) -> float:
        """A step time that suits the demand."""
        ...

    @property
    def longest_prompt(self) -> int:
        """The most tokens that one had to compute."""
        ...

    @property
    def demand(self) -> Demand:
        """Prompts that are due."""
        ...

    def __len__(self) -> int: ...

    def final_tokens(self, request: Request) -> int:
        """Prompt and output of a request."""
        ...

    def final_blocks(self, request: Request) -> int:
        """Those that they fill."""
        ...

    def peak_blocks(self) -> int:
        """The most that are needed at once."""
        ...


class Judge:
    """Asks a book; one judgement is O(n) in what is promised, and changes nothing."""

    def __init__(self, pricing: Pricing, max_num_seqs: int, num_blocks: int) -> None:
        self._pricing = pricing
        self._max_num_seqs = max_num_seqs
        self._num_blocks = num_blocks

    def find_step_s(self, book: Book, arrival: Arrival) -> float | None:
        """A step time with which everybody is in time beside what is promised, if any."""
        if self.lacks(book, arrival) is not None:
            return None
        newcomer = arrival.newcomer if arrival.terms.first_token_by < inf else None
        for pace in self._paces(book, arrival):
            if book.demand.is_early(pace, newcomer):
                return pace.step_s
        return None

    def shortage(self, book: Book, arrival: Arrival) -> str:
        """What a request that does not fit is short of, in words."""
        if (lack := self.lacks(book, arrival)) is not None:
            return lack
        newcomer = arrival.newcomer
        before = book.demand.work_before(newcomer.place) + newcomer.work
        if any(pace.end_of(before) <= newcomer.due for pace in self._paces(book, arrival)):
            return "the first token that another request is promised would be late for it"
        return "too much is promised before it"

    def lacks(self, book: Book, arrival: Arrival) -> str | None:
        """What it is short of beside time for prompts, in words."""
        if len(book) + 1 + arrival.num_reserved > self._max_num_seqs:
            seats = self._max_num_seqs
            return (
                f"at most {seats} requests run at once (max_num_seqs), and so many are promised it"
            )
        if not self._is_quick(book, arrival):
            return self._whose_tokens(book, arrival)
        if self._lacks_memory(book, arrival):
            return (
                f"KV memory is short, not time: {book.final_blocks(arrival.request)} blocks "
                f"beside those that others will need are more than the {self._num_blocks} there are"
            )
        return None

    def _whose_tokens(self, book: Book, arrival: Arrival) -> str:
        limit = book.seconds_per_token
        if limit >= arrival.terms.seconds_per_token:
            return "with one more of them, tokens would come too slowly to it"
        return (
            "with one more of them, tokens would come too slowly to another request, which is "
            f"promised one every {1e3 * limit:.0f} ms"
        )

    def decodes_with(self, book: Book, arrival: Arrival) -> StepLoad:
        """A step's part of the decodes with the newcomer, and those that places are kept for.

        Nobody decodes beside the prompt of one who is alone.
        """
        if _is_alone(book, arrival):
            return StepLoad()
        num_requests = len(book) + 1
        context = book.num_tokens + book.final_tokens(arrival.request)
        more = arrival.num_reserved
        context += more * context // num_requests
        return self._pricing.share_of(num_requests + more, context)

    def _seconds_per_token(self, book: Book, arrival: Arrival) -> float:
        return min(book.seconds_per_token, arrival.terms.seconds_per_token)

    def _is_quick(self, book: Book, arrival: Arrival) -> bool:
        """Whether decodes are few enough, with time left for prompts."""
        limit = self._seconds_per_token(book, arrival)
        if limit == inf:
            return True
        if _is_alone(book, arrival):
            own = self._pricing.share_of(1, book.final_tokens(arrival.request))
            longest_s = self._pricing.longest_step_s(limit, own)
            return self._pricing.model.step_seconds(own) <= longest_s
        decodes = self.decodes_with(book, arrival)
        step_s = self._pricing.longest_step_s(limit, decodes)
        return step_s > 0 and self._pricing.capacity(step_s, decodes, 0).work > 0

    def _lacks_memory(self, book: Book, arrival: Arrival) -> bool:
        """Whether blocks are missing with all promised requests at their peak."""
        if not len(book):  # Alone it fits, or is too long for any budget.
            return False
        own = book.final_blocks(arrival.request) + arrival.num_reserved_blocks
        if book.num_blocks + own <= self._num_blocks:
            return False
        return book.peak_blocks() + own > self._num_blocks

    def _paces(self, book: Book, arrival: Arrival) -> Iterator[Pace]:
        in_flight = self._pricing.max_in_flight
        for capacity in self._capacities(book, arrival):
            if capacity.work > 0:
                start = arrival.now + arrival.ahead.wait_s(capacity.step_s, in_flight)
                yield self._pricing.pace(capacity, start)

    def _capacities(self, book: Book, arrival: Arrival) -> Iterator[Capacity]:
        pricing, decodes = self._pricing, self.decodes_with(book, arrival)
        prompt = max(book.longest_prompt, arrival.num_uncached_tokens + arrival.num_cached_tokens)
        tried: set[float] = set()
        for step_s in self._step_times(book, arrival, decodes):
            if step_s not in tried:
                tried.add(step_s)
                capacity = pricing.capacity(step_s, decodes, prompt)
                work = capacity.work - arrival.reserved_share * step_s
                yield Capacity(step_s, capacity.decodes_s, work)

    def _step_times(self, book: Book, arrival: Arrival, decodes: StepLoad) -> Iterator[float]:
        """Worth trying: as now, which nearly always does, or what has a prompt that nobody else is
        before through all stages soonest; the whole prompt at once; finer ones.
        """
        pricing, limit = self._pricing, self._seconds_per_token(book, arrival)
        if _is_alone(book, arrival):
            limit = inf
        longest = pricing.longest_step_s(limit, decodes)
        num_tokens, context = arrival.num_uncached_tokens, arrival.num_cached_tokens
        if book.step_s == inf:
            yield min(longest, pricing.soonest_step_s(decodes, num_tokens, context))
        yield min(longest, book.step_s)
        yield min(longest, pricing.step_s_of_prompt(decodes, num_tokens, context))
        # A hair less than it has, so that rounding decides nothing when all of it is needed.
        first_s = (arrival.terms.first_token_by - arrival.now) * (1 - 1e-6)
        yield min(longest, first_s / (STEPS_PER_LIMIT * pricing.max_in_flight))


def _is_alone(book: Book, arrival: Arrival) -> bool:
    return not len(book) and not arrival.num_reserved
