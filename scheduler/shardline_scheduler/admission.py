"""Who is promised that his latency budget will be kept, decided at arrival by prediction.

A request is admitted if, with it, every promise can still be kept: decodes stay within the tightest
time per token, prefill work is done before it is due, seats and KV memory suffice at their peak.
Guests do not count: they get what is left over.
"""

from collections.abc import Callable
from dataclasses import replace
from math import inf, sqrt

from .budget import BudgetPrediction, OnMiss
from .capacity import Pricing
from .config import SchedulerConfig
from .errors import BudgetImpossible, BudgetRefused, BudgetUnmet, TenantQuotaExceeded
from .ledger import Ledger
from .lengths import OutputLengths
from .patience import Patience
from .policy import Policy
from .request import Request
from .tenants import INPUT_WEIGHT, OUTPUT_WEIGHT, Tenants
from .terms import Rank, Terms
from .verdict import LEAST_WAIT_S, Ahead, Arrival, Judge

# What one step in ten exceeds, so many times, is what one in two hundred does.
_SURE = 2.0


class Admission:
    """Follows every request from arrival to end. `jitter` gives numbers from 0 on, by whose part
    waits grow, so that those who are sent away together do not come back together.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pricing: Pricing,
        policy: Policy,
        jitter: Callable[[], float],
    ) -> None:
        self.ledger = Ledger(config.block_size)
        self.lengths = OutputLengths()
        self._pricing = pricing
        self._policy = policy
        self._jitter = jitter
        self._judge = Judge(pricing, config.max_num_seqs, config.num_blocks)
        self._tenants = Tenants()
        self._patience = Patience(config)
        self._charges: dict[Request, float] = {}
        self._nothing_promised = Ledger(config.block_size)

    def admit(self, request: Request, now: float, num_cached_tokens: int, ahead: Ahead) -> None:
        """Give the request its terms and prediction, and count it.

        Raises BudgetImpossible, BudgetUnmet or TenantQuotaExceeded, unless it would rather be
        degraded.
        """
        terms = request.terms = Terms(
            num_planned_tokens=self.lengths.planned(request), num_cached_tokens=num_cached_tokens
        )
        is_measured = self._pricing.model.is_ready
        first_s = token_s = 0.0
        if is_measured:
            num_uncached = len(request.token_ids) - num_cached_tokens
            terms.prefill_s = self._pricing.model.prefill_seconds(num_uncached, num_cached_tokens)
            first_s, token_s = self._predict(request, num_cached_tokens, ahead)
        self._tenants.ask(request.tenant, now, terms.prefill_s, terms.num_planned_tokens * token_s)
        if not request.budget.is_unlimited:
            terms.rank = Rank.PROMISED
            _aim(request, first_s, token_s, self._pricing.max_in_flight)
            self._allow_for_spread(terms)
            if is_measured:
                self._check(self._arrival(request, now, num_cached_tokens, ahead))
        self._take_in(request)

    def promise_starving(self, now: float, ahead: Ahead) -> Request | None:
        """The guest, if any, who is promised something from now on since he has waited so long."""
        if not (len(self.ledger) and self._pricing.model.is_ready and self._patience.is_time(now)):
            return None
        request = self._patience.find(self._charges, now)
        if request is None:
            return None
        terms, prefill_s = request.terms, self._prefill_s(request)
        due = self._patience.due(prefill_s, now) if _has_prompt_left(request) else None
        old, terms.rank = terms.first_token_by, Rank.PROMISED
        terms.first_token_by = inf if due is None else due
        arrival = self._arrival(request, now, terms.num_cached_tokens, ahead)
        step_s = self._judge.find_step_s(self.ledger, arrival)
        if step_s is None:
            terms.rank, terms.first_token_by = Rank.UNLIMITED, old
            self._patience.starving = request
            return None
        terms.prefill_s = prefill_s
        self._tenants.begin_promise(request.tenant)
        self.ledger.feasible_step_s = min(step_s, self.ledger.step_s)
        self.ledger.add(request, self._place(request), prefill_s)
        self._patience.help(request, due)
        return request

    def start(self, request: Request) -> None:
        """It begins to run, with some of its prompt computed perhaps."""
        if request.terms.is_promised:
            self.progress(request)
        else:
            self._tenants.serve(request.terms.turn)

    def progress(self, request: Request) -> None:
        """A chunk of its prompt has been planned."""
        if not request.terms.is_promised:
            return
        if request.is_token_in_flight:
            self.ledger.demand.remove(request)
        else:
            self.ledger.demand.reduce(request, self._prefill_s(request))

    def restart(self, request: Request) -> None:
        """It has lost what was computed."""
        if request.terms.is_promised:
            self.ledger.compute_again(request, self._place(request), self._prefill_s)

    def outgrow(self, request: Request) -> None:
        """It has as many tokens as were planned, and goes on."""
        request.terms.num_planned_tokens = self.lengths.planned(request)
        if request.terms.is_promised:
            self.ledger.replan(request)

    def degrade(self, request: Request) -> None:
        """Its budget cannot be kept: it is a guest from now on."""
        self._end_promise(request)
        request.terms.rank = Rank.DEGRADED

    def remove(self, request: Request, *, is_complete: bool) -> None:
        """It is over; `is_complete` if it has said all that it had to say."""
        if request.terms.is_promised:
            self._end_promise(request)
        if is_complete:
            self.lengths.observe(request)
        self._patience.forget(request)
        spent = _cost(request.num_prompt_tokens, request.num_output_tokens)
        self._tenants.end(request.tenant, self._charges.pop(request) - spent)

    def check(self) -> None:
        """Assert that nothing is counted that is over."""
        self.ledger.check()
        promised = {request for request in self._charges if request.terms.is_promised}
        assert promised == set(self.ledger.requests), "promises to nobody, or forgotten ones"

    def _allow_for_spread(self, terms: Terms) -> None:
        """Planning adds what one step in ten exceeds. Over many tokens that averages out; the mean
        of few, whose spread falls with the root of their number, needs about twice as much.
        """
        num_later = terms.num_planned_tokens - 1
        if terms.seconds_per_token == inf or not self._pricing.model.is_ready:
            return
        ledger, pricing = self.ledger, self._pricing
        spread = pricing.spread_of(pricing.share_of(len(ledger) + 1, ledger.num_tokens))
        of_mean = _SURE * spread / sqrt(num_later * pricing.max_in_flight)
        terms.seconds_per_token *= (1 + spread) / (1 + max(spread, of_mean))

    def _predict(
        self, request: Request, num_cached_tokens: int, ahead: Ahead
    ) -> tuple[float, float]:
        """Seconds to the first token, and of each later one; also told as the prediction."""
        ledger, pricing, terms = self.ledger, self._pricing, request.terms
        decodes = pricing.share_of(len(ledger) + 1, ledger.num_tokens)
        token_s = pricing.token_s(decodes)
        num_tokens = len(request.token_ids) - num_cached_tokens
        longest = pricing.longest_step_s(ledger.seconds_per_token, decodes)
        whole_s = pricing.step_s_of_prompt(decodes, num_tokens, num_cached_tokens)
        step_s = min(longest, max(whole_s, ledger.step_s))
        capacity = pricing.capacity(step_s, decodes, len(request.token_ids))
        before = ledger.demand.work_before(self._place(request)) + terms.prefill_s
        queue_s = before / (capacity.work or capacity.step_s) * capacity.step_s
        wait_s = ahead.wait_s(capacity.step_s, pricing.max_in_flight)
        first_s = wait_s + queue_s + token_s
        num_later = terms.num_planned_tokens - 1
        request.prediction = BudgetPrediction(
            ttft_ms=first_s * 1e3,
            tpot_ms=token_s * 1e3,
            e2e_ms=(first_s + num_later * token_s) * 1e3,
        )
        return first_s, token_s

    def _arrival(
        self, request: Request, now: float, num_cached_tokens: int, ahead: Ahead
    ) -> Arrival:
        return Arrival(
            request=request,
            place=self._place(request),
            now=now,
            num_cached_tokens=num_cached_tokens,
            ahead=ahead,
        )

    def _check(self, arrival: Arrival) -> None:
        """Hold the request against what is promised; refused or degraded, or the step time that
        suits everybody is taken over.
        """
        step_s = self._judge.find_step_s(self.ledger, arrival)
        objection = self._unmet(arrival) if step_s is None else self._objection(arrival)
        if objection is None and step_s is not None:
            self.ledger.feasible_step_s = step_s
        elif objection is not None and arrival.request.budget.on_miss is OnMiss.REJECT:
            raise objection
        else:
            arrival.request.terms.rank = Rank.DEGRADED

    def _unmet(self, arrival: Arrival) -> BudgetRefused:
        """Why a request is not taken in that does not fit."""
        asked, predicted = arrival.request.budget, arrival.request.prediction
        alone = replace(arrival, ahead=Ahead(), num_reserved=0, reserved_share=0.0)
        alone = replace(alone, num_reserved_blocks=0)
        if self._judge.find_step_s(self._nothing_promised, alone) is None:
            return BudgetImpossible(asked, predicted)
        shortage = self._judge.shortage(self.ledger, arrival)
        wait_s = self._retry_after(shortage.delay_s)
        return BudgetUnmet(asked, predicted, wait_s, shortage.reason)

    def _objection(self, arrival: Arrival) -> BudgetRefused | None:
        """What is kept for others, if a request that would fit leaves too little of it."""
        request, ledger, judge = arrival.request, self.ledger, self._judge
        if (starving := self._patience.starving) is not None:
            careful = replace(
                arrival,
                num_reserved=1,
                reserved_share=self._patience.share,
                num_reserved_blocks=ledger.final_blocks(starving),
            )
            if judge.find_step_s(ledger, careful) is None:
                return self._unmet(careful)
        reserve = self._tenants.reserve(request.tenant, arrival.now)
        if not (reserve.num_requests or reserve.prefill_share):
            return None
        careful = replace(
            arrival, num_reserved=reserve.num_requests, reserved_share=reserve.prefill_share
        )
        if judge.find_step_s(ledger, careful) is not None:
            return None
        wait_s = self._retry_after(judge.shortage(ledger, careful).delay_s)
        return TenantQuotaExceeded(request.tenant, request.budget, request.prediction, wait_s)

    def _retry_after(self, delay_s: float) -> float:
        return max(delay_s, LEAST_WAIT_S) * (1 + self._jitter())

    def _take_in(self, request: Request) -> None:
        terms = request.terms
        cost = _cost(request.num_prompt_tokens, terms.num_planned_tokens)
        self._charges[request] = cost
        terms.turn = self._tenants.queue(request.tenant, cost, is_promised=terms.is_promised)
        if terms.is_promised:
            self.ledger.add(request, self._place(request), terms.prefill_s)

    def _end_promise(self, request: Request) -> None:
        self.ledger.remove(request)
        self._tenants.end_promise(request.tenant)

    def _prefill_s(self, request: Request) -> float:
        model, context = self._pricing.model, request.num_computed_tokens
        if not model.is_ready:
            return 0.0
        num_tokens = max(0, len(request.token_ids) - context)  # Planned ahead, it is below 0.
        return model.prefill_seconds(num_tokens, context)

    def _place(self, request: Request) -> tuple[tuple[float, ...], int]:
        return self._policy.key(request), request.sequence


def _has_prompt_left(request: Request) -> bool:
    return len(request.token_ids) - request.num_computed_tokens > 1


def _aim(request: Request, first_s: float, token_s: float, max_in_flight: int) -> None:
    """Split the limits of a budget into a due first token and a time for each later one.

    Of what a limit on the whole leaves over, prefill and decoding get half each. Until a request
    has its place among the decodes of several steps in flight, it may lose all but one of a round.
    """
    budget, terms, now = request.budget, request.terms, request.arrival_time
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


def _cost(num_input: int, num_output: int) -> float:
    return INPUT_WEIGHT * num_input + OUTPUT_WEIGHT * num_output
