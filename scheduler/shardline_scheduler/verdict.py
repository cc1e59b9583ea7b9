"""Whether one more request fits beside what is promised, and when it would. Pure questions."""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import nsmallest
from math import inf

from .capacity import Capacity, Pricing
from .cost import StepLoad
from .demand import Newcomer, Pace, Place
from .ledger import STEPS_PER_LIMIT, Ledger
from .request import NEVER, Request

# What a retry waits at least, where nothing tells how long something takes.
LEAST_WAIT_S = 0.05


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is in flight: the next step can be planned in `next_s`, the last one is back in
    `back_s`.
    """

    next_s: float = 0.0
    back_s: float = 0.0

    def wait_s(self, step_s: float, max_in_flight: int) -> float:
        """Until steps of `step_s` follow each other as in a pipe that has always done so."""
        return max(self.next_s, self.back_s - (max_in_flight - 1) * step_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A request at the door. `num_reserved` requests, a `reserved_share` of the time for prompts,
    and `num_reserved_blocks` of memory have to stay free beside it.
    """

    request: Request
    place: Place
    now: float
    num_cached_tokens: int
    ahead: Ahead
    num_reserved: int = 0
    reserved_share: float = 0.0
    num_reserved_blocks: int = 0

    @property
    def num_uncached_tokens(self) -> int:
        """Tokens that have to be computed for its first token."""
        return len(self.request.token_ids) - self.num_cached_tokens

    @property
    def newcomer(self) -> Newcomer:
        """Its part of the demand; due at infinity if it has no limit on its first token."""
        terms = self.request.terms
        return Newcomer(self.place, terms.first_token_by, terms.prefill_s)


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a request does not fit, in words, and how much later it would."""

    delay_s: float
    reason: str


class Judge:
    """Asks a ledger; one judgement is O(n) in what is promised, and changes nothing."""

    def __init__(self, pricing: Pricing, max_num_seqs: int, num_blocks: int) -> None:
        self._pricing = pricing
        self._max_num_seqs = max_num_seqs
        self._num_blocks = num_blocks

    def find_step_s(self, ledger: Ledger, arrival: Arrival) -> float | None:
        """A step time with which everybody is in time beside what the ledger promises, if any."""
        if (
            self._delay_of_seats(ledger, arrival) > 0
            or self._delay_of_decodes(ledger, arrival) > 0
            or self._delay_of_memory(ledger, arrival) > 0
        ):
            return None
        has_limit, newcomer = arrival.newcomer.due < inf, arrival.newcomer
        for pace in self._paces(ledger, arrival):
            if ledger.demand.is_early(pace, newcomer if has_limit else None):
                return pace.step_s
        return None

    def shortage(self, ledger: Ledger, arrival: Arrival) -> Shortage:
        """What a request that does not fit now has to wait for, the load being as it is."""
        others = self._shortages(ledger, arrival)
        worst = max(others, key=lambda shortage: shortage.delay_s)
        if worst.delay_s > 0:
            return worst
        return Shortage(self._delay_of_prefill(ledger, arrival), "too much is promised before it")

    def _shortages(self, ledger: Ledger, arrival: Arrival) -> list[Shortage]:
        """Of all but time for prompts."""
        seats, blocks = self._max_num_seqs, self._num_blocks
        return [
            Shortage(
                self._delay_of_seats(ledger, arrival),
                f"at most {seats} requests run at once (max_num_seqs), and so many are promised it",
            ),
            Shortage(
                self._delay_of_decodes(ledger, arrival),
                "with one more of them, tokens would come too slowly to somebody",
            ),
            Shortage(
                self._delay_of_memory(ledger, arrival),
                f"KV memory is short, not time: {ledger.final_blocks(arrival.request)} blocks "
                f"beside those that others will need are more than the {blocks} there are",
            ),
        ]

    def decodes_with(self, ledger: Ledger, arrival: Arrival) -> StepLoad:
        """A step's part of the decodes with the newcomer, and those that places are kept for.

        Nobody decodes beside the prompt of one who is alone.
        """
        if _is_alone(ledger, arrival):
            return StepLoad()
        num_requests = len(ledger) + 1
        context = ledger.num_tokens + ledger.final_tokens(arrival.request)
        more = arrival.num_reserved
        context += more * context // num_requests
        return self._pricing.share_of(num_requests + more, context)

    def _seconds_per_token(self, ledger: Ledger, arrival: Arrival) -> float:
        return min(ledger.seconds_per_token, arrival.request.terms.seconds_per_token)

    def _delay_of_seats(self, ledger: Ledger, arrival: Arrival) -> float:
        num_too_many = len(ledger) + 1 + arrival.num_reserved - self._max_num_seqs
        return self._until_ended(ledger, num_too_many) if num_too_many > 0 else 0.0

    def _delay_of_decodes(self, ledger: Ledger, arrival: Arrival) -> float:
        """Until decodes are few enough to be quick, with time left for a tile of prompts."""
        limit = self._seconds_per_token(ledger, arrival)
        if limit == inf:
            return 0.0
        if _is_alone(ledger, arrival):
            own = self._pricing.share_of(1, ledger.final_tokens(arrival.request))
            step_s = self._pricing.longest_step_s(limit, own)
            return 0.0 if self._pricing.model.step_seconds(own) <= step_s else LEAST_WAIT_S
        decodes = self.decodes_with(ledger, arrival)
        if self._leaves_time(limit, decodes):
            return 0.0
        few, many = 0, len(ledger) + 1 + arrival.num_reserved
        context_each = decodes.decode_context // max(1, decodes.num_decodes)
        while few + 1 < many:
            middle = (few + many) // 2
            if self._leaves_time(limit, self._pricing.share_of(middle, middle * context_each)):
                few = middle
            else:
                many = middle
        return self._until_ended(ledger, len(ledger) + 1 + arrival.num_reserved - few)

    def _leaves_time(self, seconds_per_token: float, decodes: StepLoad) -> bool:
        step_s = self._pricing.longest_step_s(seconds_per_token, decodes)
        return step_s > 0 and self._pricing.capacity(step_s, decodes, 0).work > 0

    def _delay_of_memory(self, ledger: Ledger, arrival: Arrival) -> float:
        """Until memory suffices for all promised requests at their peak."""
        own = ledger.final_blocks(arrival.request) + arrival.num_reserved_blocks
        missing = ledger.num_blocks + own - self._num_blocks
        if missing > 0:
            missing -= ledger.num_blocks - ledger.peak_blocks()
        if missing <= 0 or not len(ledger):  # Alone it fits, or is too long for any budget.
            return 0.0
        pace, delay_s = self._slow_token_s(ledger), 0.0
        for request in sorted(ledger.requests, key=lambda request: _end_s(request, pace)):
            if missing <= 0:
                break
            missing -= ledger.final_blocks(request)
            delay_s = _end_s(request, pace)
        return delay_s

    def _delay_of_prefill(self, ledger: Ledger, arrival: Arrival) -> float:
        """Until the prompt is done in time, and nobody else's is late for it."""
        newcomer, demand = arrival.newcomer, ledger.demand
        delays = [
            demand.delay_until_fit(pace, newcomer)
            if newcomer.due < inf
            else demand.work / pace.share
            for pace in self._paces(ledger, arrival)
        ]
        return max(min(delays), 1e-3) if delays else self._until_ended(ledger, 1)

    def _paces(self, ledger: Ledger, arrival: Arrival) -> Iterator[Pace]:
        in_flight = self._pricing.max_in_flight
        for capacity in self._capacities(ledger, arrival):
            if capacity.work > 0:
                start = arrival.now + arrival.ahead.wait_s(capacity.step_s, in_flight)
                yield self._pricing.pace(capacity, start)

    def _capacities(self, ledger: Ledger, arrival: Arrival) -> Iterator[Capacity]:
        """With step times worth trying: as now, the whole prompt at once, finer ones."""
        pricing, decodes = self._pricing, self.decodes_with(ledger, arrival)
        limit = self._seconds_per_token(ledger, arrival)
        if _is_alone(ledger, arrival):
            limit = inf
        longest = pricing.longest_step_s(limit, decodes)
        num_tokens, context = arrival.num_uncached_tokens, arrival.num_cached_tokens
        first_s = arrival.newcomer.due - arrival.now
        wanted = {
            min(longest, ledger.step_s): None,
            min(longest, pricing.step_s_of_prompt(decodes, num_tokens, context)): None,
            min(longest, first_s / (STEPS_PER_LIMIT * pricing.max_in_flight)): None,
        }
        prompt = max(ledger.longest_prompt, num_tokens + context)
        for step_s in wanted:
            capacity = pricing.capacity(step_s, decodes, prompt)
            yield Capacity(
                step_s, capacity.decodes_s, capacity.work - arrival.reserved_share * step_s
            )

    def _until_ended(self, ledger: Ledger, num_requests: int) -> float:
        """Until so many of the promised requests have ended."""
        pace = self._slow_token_s(ledger)
        ends = nsmallest(num_requests, (_end_s(request, pace) for request in ledger.requests))
        return ends[-1] if ends else LEAST_WAIT_S

    def _slow_token_s(self, ledger: Ledger) -> float:
        """The slowest that tokens come to those who are promised something."""
        decodes = self._pricing.share_of(max(1, len(ledger)), ledger.num_tokens)
        step_s = self._pricing.longest_step_s(ledger.seconds_per_token, decodes)
        step_s = max(min(step_s, ledger.step_s), self._pricing.model.step_seconds(decodes))
        return self._pricing.max_in_flight * step_s + self._pricing.model.trip_overhead_s


def _is_alone(ledger: Ledger, arrival: Arrival) -> bool:
    return not len(ledger) and not arrival.num_reserved


def _end_s(request: Request, token_s: float) -> float:
    """In how many seconds a promised request is over, if each token takes `token_s`."""
    terms = request.terms
    num_left = max(1, terms.num_planned_tokens - request.num_output_tokens)
    waits_s = 0.0
    if request.first_token_time == NEVER and terms.first_token_by < inf:
        waits_s = max(0.0, terms.first_token_by - request.arrival_time)
    return waits_s + num_left * min(token_s, terms.seconds_per_token)
