"""How a request arrives: its limits as terms, and a prediction beside what is promised."""

from math import inf, sqrt

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
        first_s = token_s = 0.0
        if self._pricing.model.is_ready:
            num_uncached = len(request.token_ids) - num_cached_tokens
            terms.prefill_s = self._pricing.model.prefill_seconds(num_uncached, num_cached_tokens)
            first_s, token_s = self._predict(book, request, num_cached_tokens, ahead)
            request.prediction = _told(first_s, token_s, terms)
        return self._with_limits(book, request, now, ahead, (first_s, token_s))

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
        expected_s = 0.0, 0.0
        if request.budget.deadline_ms is not None:
            expected_s = self._predict(book, request, before.num_cached_tokens, ahead)
        return self._with_limits(book, request, now, ahead, expected_s)

    def _with_limits(
        self,
        book: Book,
        request: Request,
        now: float,
        ahead: Ahead,
        expected_s: tuple[float, float],
    ) -> Arrival:
        terms = request.terms
        if not request.budget.is_unlimited:
            terms.rank = Rank.PROMISED
            _aim(terms, request.budget, now, expected_s, self._pricing.max_in_flight)
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
        """Planning adds what one step in ten exceeds. Over many tokens that averages out; the mean
        of few, whose spread falls with the root of their number, needs about twice as much.
        """
        num_later = terms.num_planned_tokens - 1
        if terms.seconds_per_token == inf or not self._pricing.model.is_ready:
            return
        pricing = self._pricing
        spread = pricing.spread_of(pricing.share_of(len(book) + 1, book.num_tokens))
        of_mean = _SURE * spread / sqrt(num_later * pricing.max_in_flight)
        terms.seconds_per_token *= (1 + spread) / (1 + max(spread, of_mean))

    def _predict(
        self, book: Book, request: Request, num_cached_tokens: int, ahead: Ahead
    ) -> tuple[float, float]:
        """Seconds to the first token, and of each later one."""
        pricing, terms = self._pricing, request.terms
        decodes = pricing.share_of(len(book) + 1, book.num_tokens)
        token_s = pricing.token_s(decodes)
        num_tokens = len(request.token_ids) - num_cached_tokens
        longest = pricing.longest_step_s(book.seconds_per_token, decodes)
        whole_s = pricing.step_s_of_prompt(decodes, num_tokens, num_cached_tokens)
        step_s = min(longest, max(whole_s, book.step_s))
        capacity = pricing.capacity(step_s, decodes, len(request.token_ids))
        before = book.demand.work_before(self.place(request)) + terms.prefill_s
        queue_s = before / (capacity.work or capacity.step_s) * capacity.step_s
        wait_s = ahead.wait_s(capacity.step_s, pricing.max_in_flight)
        return wait_s + queue_s + token_s, token_s

    def place(self, request: Request) -> Place:
        """In the order in which prompts are computed."""
        return self._policy.key(request), request.sequence


def _told(first_s: float, token_s: float, terms: Terms) -> BudgetPrediction:
    num_later = terms.num_planned_tokens - 1
    return BudgetPrediction(
        ttft_ms=first_s * 1e3,
        tpot_ms=token_s * 1e3,
        e2e_ms=(first_s + num_later * token_s) * 1e3,
    )


def _aim(
    terms: Terms,
    budget: LatencyBudget,
    now: float,
    expected_s: tuple[float, float],
    max_in_flight: int,
) -> None:
    """Split the limits of a budget into a due first token and a time for each later one.

    Of what a limit on the whole leaves over, prefill and decoding get half each. Until a request
    has its place among the decodes of several steps in flight, it may lose all but one of a round.
    """
    first_s, token_s = expected_s
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
        terms.seconds_per_token *= num_later / (num_later + 1 - 1 / max_in_flight)
