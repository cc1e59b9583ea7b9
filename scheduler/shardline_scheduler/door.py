"""How a request arrives: its limits as terms, and a prediction beside what is promised."""

from dataclasses import dataclass
from math import ceil, inf, sqrt

from .budget import BudgetPrediction, LatencyBudget
from .capacity import Pricing
from .demand import Place
from .lengths import OutputLengths
from .policy import Policy
from .request import Request
from .terms import Rank, Terms
from .verdict import Ahead, Arrival, Book

# What one step in ten exceeds, so many times, is what one in two hundred does.
_SURE = 2.0


@dataclass(frozen=True, slots=True)
class _Expected:
    """Seconds to the first token and of each later one, as planning sees them: the first with
    `first_spread` of it added for safety.
    """

    first_s: float = 0.0
    first_spread: float = 0.0
    token_s: float = 0.0


class Door:
    """Makes arrivals of requests: at a Ledger as it is, or at what a forecast says of it."""

    def __init__(self, pricing: Pricing, policy: Policy, lengths: OutputLengths) -> None:
        self._pricing = pricing
        self._policy = policy
        self._lengths = lengths

    def arrive(
        self, book: Book, request: Request, now: float, num_cached_tokens: int, ahead: Ahead
    ) -> Arrival:
        """The request as it arrives beside that book, with terms that suit it and a prediction."""
        terms = request.terms = Terms(
            num_planned_tokens=self._lengths.planned(request), num_cached_tokens=num_cached_tokens
        )
        expected = _Expected()
        if self._pricing.model.is_ready:
            num_uncached = len(request.token_ids) - num_cached_tokens
            terms.prefill_s = self._pricing.model.prefill_seconds(num_uncached, num_cached_tokens)
            expected = self._predict(book, request, ahead)
            request.prediction = _told(expected, terms)
        return self._with_limits(book, request, now, ahead, expected)

    def arrive_again(self, arrival: Arrival, book: Book, now: float, ahead: Ahead) -> Arrival:
        """The same request, whose terms are lost by it, beside another book or at another time.

        What it would be told is only predicted where its limits hang on that.
        """
        request, before = arrival.request, arrival.terms
        request.terms = Terms(
            num_planned_tokens=before.num_planned_tokens,
            num_cached_tokens=before.num_cached_tokens,
            prefill_s=before.prefill_s,
        )
        expected = _Expected()
        if request.budget.deadline_ms is not None:
            expected = self._predict(book, request, ahead)
        return self._with_limits(book, request, now, ahead, expected)

    def _with_limits(
        self,
        book: Book,
        request: Request,
        now: float,
        ahead: Ahead,
        expected: _Expected,
    ) -> Arrival:
        terms = request.terms
        if not request.budget.is_unlimited:
            terms.rank = Rank.PROMISED
            _aim(terms, request.budget, now, expected, self._pricing.max_in_flight)
            self._allow_for_spread(book, terms)
        return Arrival(
            request=request,
            terms=terms,
            place=self.place(request),
            now=now,
            num_cached_tokens=terms.num_cached_tokens,
            ahead=ahead,
        )

    def _allow_for_spread(self, book: Book, terms: Terms) -> None:
        """Planning adds what one step in ten exceeds. Over many tokens that averages out, but for
        what makes all of them slow: half of it is kept. The mean of few, whose spread falls with
        the root of their number, needs about twice as much. Steps with prompts and without differ
        in their spread, and tokens come from either: no more than both have.
        """
        num_later = terms.num_planned_tokens - 1
        if terms.seconds_per_token == inf or not self._pricing.model.is_ready:
            return
        pricing = self._pricing
        num_decodes = pricing.share_of(len(book) + 1, 0).num_decodes
        spread = pricing.model.least_margin(num_decodes, pricing.least_chunk)
        of_mean = _SURE * spread / sqrt(num_later * pricing.max_in_flight)
        terms.seconds_per_token *= (1 + spread) / (1 + max(spread / 2, of_mean))

    def _predict(self, book: Book, request: Request, ahead: Ahead) -> _Expected:
        """Beside that book.

        The slowest stage does all prompts up to this one in steps that hold decodes as well; the
        others do what they do at the same time, but for the largest of these steps.
        """
        pricing, terms = self._pricing, request.terms
        decodes = pricing.share_of(len(book) + 1, book.num_tokens)
        token_s = pricing.token_s(decodes)
        num_cached_tokens = terms.num_cached_tokens
        num_tokens = len(request.token_ids) - num_cached_tokens
        longest = pricing.longest_step_s(book.seconds_per_token, decodes)
        if book.step_s == inf:
            step_s = pricing.soonest_step_s(decodes, num_tokens, num_cached_tokens)
        else:
            whole_s = pricing.step_s_of_prompt(decodes, num_tokens, num_cached_tokens)
            step_s = max(whole_s, book.step_s)
        step_s = min(longest, step_s)
        capacity = pricing.capacity(step_s, decodes, len(request.token_ids))
        work_s = book.demand.work_before(self.place(request)) + terms.prefill_s
        num_steps = max(1, ceil(work_s / (capacity.work or capacity.step_s)))
        largest = decodes.copy()
        share = min(work_s, capacity.work) / terms.prefill_s if terms.prefill_s else 1.0
        largest.add_prefill(max(1, ceil(share * num_tokens)), num_cached_tokens)
        behind_s = pricing.model.trip_seconds(largest) - pricing.model.step_seconds(largest)
        wait_s = ahead.wait_s(capacity.step_s, pricing.max_in_flight)
        first_s = wait_s + work_s + num_steps * capacity.decodes_s + behind_s
        return _Expected(first_s, pricing.spread_of(largest), token_s)

    def place(self, request: Request) -> Place:
        """In the order in which prompts are computed."""
        return self._policy.key(request), request.sequence


def _told(expected: _Expected, terms: Terms) -> BudgetPrediction:
    num_later = terms.num_planned_tokens - 1
    return BudgetPrediction(
        ttft_ms=expected.first_s / (1 + expected.first_spread) * 1e3,
        tpot_ms=expected.token_s * 1e3,
        e2e_ms=(expected.first_s + num_later * expected.token_s) * 1e3,
    )


def _aim(
    terms: Terms,
    budget: LatencyBudget,
    now: float,
    expected: _Expected,
    max_in_flight: int,
) -> None:
    """Split the limits of a budget into a due first token and a time for each later one.

    Of what a limit on the whole leaves over, prefill and decoding get half each. Until a request
    has its place among the decodes of several steps in flight, it may lose all but one of a round;
    and as much again if its first step was the last short one, and the others have just begun.
    """
    first_s, token_s = expected.first_s, expected.token_s
    num_later = terms.num_planned_tokens - 1
    if budget.ttft_ms is not None:
        terms.first_token_by = now + budget.ttft_ms / 1e3
    if budget.tpot_ms is not None and num_later:
        terms.seconds_per_token = budget.tpot_ms / 1e3
    if budget.deadline_ms is not None:
        whole_s = budget.deadline_ms / 1e3
        spare_s = max(0.0, whole_s - first_s - num_later * token_s)
        first_by = now + (min(whole_s, first_s + spare_s / 2) if num_later else whole_s)
        terms.first_token_by = min(terms.first_token_by, first_by)
        if num_later:
            left_s = now + whole_s - terms.first_token_by
            terms.seconds_per_token = min(terms.seconds_per_token, left_s / num_later)
    if num_later:
        terms.seconds_per_token *= num_later / (num_later + 2 - 2 / max_in_flight)
