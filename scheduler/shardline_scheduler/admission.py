"""Who is promised that his latency budget will be kept, decided at arrival by prediction.

A request is admitted if, with it, every promise can still be kept: decodes stay within the tightest
time per token, prefill work is done before it is due, seats and KV memory suffice at their peak.
Guests do not count: they get what is left over.
"""

from collections.abc import Callable
from dataclasses import replace
from math import inf

from .asked import Reserve
from .budget import OnMiss
from .capacity import Pricing
from .config import SchedulerConfig
from .cost import StepLoad
from .door import Door
from .errors import BudgetImpossible, BudgetRefused, BudgetUnmet, TenantQuotaExceeded
from .forecast import Forecast, Guests
from .ledger import Ledger
from .lengths import OutputLengths
from .patience import Patience
from .policy import Policy
from .request import Request
from .retry import Retries
from .tenants import INPUT_WEIGHT, OUTPUT_WEIGHT, Tenants
from .terms import Rank
from .urgency import Urgency
from .verdict import Ahead, Arrival, Judge, KeptFor


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
        self._config = config
        self.ledger = Ledger(config.block_size)
        self.lengths = OutputLengths()
        self._pricing = pricing
        self._door = Door(pricing, policy, self.lengths)
        self._jitter = jitter
        self._judge = Judge(pricing, config.max_num_seqs, config.num_blocks)
        self._tenants = Tenants()
        self._urgency = Urgency()
        self._patience = Patience(config)
        self._retries = Retries()
        self._charges: dict[Request, float] = {}
        self._nothing_promised = Ledger(config.block_size)
        self._unlimited: list[Request] = []
        self._forecast: Forecast | None = None

    def admit(self, request: Request, now: float, num_cached_tokens: int, ahead: Ahead) -> None:
        """Give the request its terms and prediction, and count it.

        Raises BudgetImpossible, BudgetUnmet or TenantQuotaExceeded, unless it would rather be
        degraded.
        """
        arrival = self._door.arrive(self.ledger, request, now, num_cached_tokens, ahead)
        terms, stay_s = arrival.terms, self._stay_s(request)
        self._tenants.ask(request.tenant, now, terms.prefill_s, stay_s)
        if terms.is_promised and self._pricing.model.is_ready:
            self._urgency.ask(request.budget.priority, now, terms.prefill_s, stay_s)
            self._check(arrival)
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
        terms.prefill_s = prefill_s  # What is left of it has a say in its place.
        arrival = Arrival(
            request=request,
            terms=terms,
            place=self._door.place(request),
            now=now,
            num_cached_tokens=terms.num_cached_tokens,
            ahead=ahead,
        )
        step_s = self._judge.find_step_s(self.ledger, arrival)
        if step_s is None:
            terms.rank, terms.first_token_by = Rank.UNLIMITED, old
            self._patience.starving = request
            return None
        self._tenants.begin_promise(request.tenant)
        self._urgency.begin_promise(request.budget.priority)
        self.ledger.feasible_step_s = min(step_s, self.ledger.step_s)
        self.ledger.add(request, self._door.place(request), prefill_s)
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
            self.ledger.compute_again(request, self._door.place(request), self._prefill_s)

    def outgrow(self, request: Request) -> None:
        """It has as many tokens as were planned, and goes on."""
        request.terms.num_planned_tokens = self.lengths.planned(request)
        self._forecast = None
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
        self._forecast = None
        spent = _cost(request.num_prompt_tokens, request.num_output_tokens)
        self._tenants.end(request.tenant, self._charges.pop(request) - spent)

    def check(self) -> None:
        """Assert that nothing is counted that is over."""
        self.ledger.check()
        promised = {request for request in self._charges if request.terms.is_promised}
        assert promised == set(self.ledger.requests), "promises to nobody, or forgotten ones"

    def _stay_s(self, request: Request) -> float:
        """How long it has a seat: steps are made as long as its limit on the time per token allows,
        or as they can be.
        """
        predicted, budget, pricing = request.prediction, request.budget, self._pricing
        if predicted.ttft_ms is None or predicted.tpot_ms is None:
            return 0.0
        first_s = min(predicted.ttft_ms, budget.ttft_ms or inf) / 1e3
        token_s = predicted.tpot_ms / 1e3
        if budget.tpot_ms is not None:
            step_s = pricing.longest_step_s(budget.tpot_ms / 1e3, StepLoad())
            token_s = max(token_s, pricing.max_in_flight * step_s)
        stay_s = first_s + request.terms.num_planned_tokens * token_s
        return min(stay_s, (budget.deadline_ms or inf) / 1e3)

    def _check(self, arrival: Arrival) -> None:
        """Hold the request against what is promised; refused or degraded, or the step time that
        suits everybody is taken over.
        """
        request, rejects = arrival.request, arrival.request.budget.on_miss is OnMiss.REJECT
        if rejects and _is_hopeless(arrival):
            raise BudgetImpossible(request.budget, request.prediction)
        step_s = self._judge.find_step_s(self.ledger, arrival)
        obstacle = arrival if step_s is None else self._obstacle(arrival)
        if obstacle is None and step_s is not None:
            self.ledger.feasible_step_s = step_s
        elif obstacle is not None and rejects:
            raise self._refusal(arrival, obstacle)
        else:
            arrival.terms.rank = Rank.DEGRADED

    def _obstacle(self, arrival: Arrival) -> Arrival | None:
        """The arrival with what is kept for others, if it would fit but leaves too little of it."""
        for careful in (
            self._leaving_place(arrival),
            self._leaving_shares(arrival),
            self._leaving_room(arrival),
        ):
            if careful is not arrival and self._judge.find_step_s(self.ledger, careful) is None:
                return careful
        return None

    def _leaving_place(self, arrival: Arrival) -> Arrival:
        """For the guest who starves, if there is one."""
        if (starving := self._patience.starving) is None:
            return arrival
        return replace(
            arrival,
            num_reserved=1,
            reserved_share=self._patience.share,
            num_reserved_blocks=self.ledger.final_blocks(starving),
            kept_for=KeptFor.GUEST,
        )

    def _leaving_shares(self, arrival: Arrival) -> Arrival:
        """For other tenants."""
        reserve = self._tenants.reserve(arrival.request.tenant, arrival.now)
        return _leaving(reserve, arrival, KeptFor.TENANTS)

    def _leaving_room(self, arrival: Arrival) -> Arrival:
        """For more urgent classes."""
        reserve = self._urgency.reserve(arrival.request.budget.priority, arrival.now)
        return _leaving(reserve, arrival, KeptFor.URGENT)

    def _refusal(self, arrival: Arrival, obstacle: Arrival) -> BudgetRefused:
        """Why a request is not taken in that does not fit."""
        request = arrival.request
        asked, predicted = request.budget, request.prediction
        nothing = self._nothing_promised
        alone = self._door.arrive_again(arrival, nothing, arrival.now, Ahead())
        if self._judge.find_step_s(nothing, alone) is None:
            return BudgetImpossible(asked, predicted)
        reason = self._shortage(obstacle)
        wait_s = self._retry_after_s(arrival)
        if obstacle.kept_for is KeptFor.TENANTS:
            return TenantQuotaExceeded(request.tenant, asked, predicted, wait_s)
        return BudgetUnmet(asked, predicted, wait_s, reason)

    def _shortage(self, obstacle: Arrival) -> str:
        if obstacle.kept_for is KeptFor.URGENT:
            return "what is left is kept for more urgent classes, by what they lately asked for"
        return self._judge.shortage(self.ledger, obstacle)

    def _retry_after_s(self, arrival: Arrival) -> float:
        """When it would be taken in, were it to come again. Its terms are lost in trying."""
        if (due := arrival.newcomer.due) < inf:
            self.ledger.guard(arrival.now, due - arrival.now)
        forecast = self._forecast_of(arrival)

        def passes(time: float) -> bool:
            book, ahead = forecast.at(time), forecast.ahead_at(time)
            later = self._leaving_most(self._door.arrive_again(arrival, book, time, ahead))
            return self._judge.find_step_s(book, later) is not None

        time = self._retries.earliest(arrival.now, forecast.last_end, passes)
        if time is None:
            time = forecast.end_of_guests(self._config.max_num_seqs, self._config.num_blocks)
        return (time - arrival.now) * (1 + self._jitter())

    def _leaving_most(self, later: Arrival) -> Arrival:
        """With all that may have to stay free beside it by then, for guests and other tenants."""
        helped = self._patience.helped_by(later.now, self._unlimited)
        guests = [guest.tenant for guest in helped]
        tenants = self._tenants.reserve_later(later.request.tenant, later.now, guests)
        urgent = self._urgency.reserve_later(later.request.budget.priority, later.now)
        num_reserved = max(tenants.num_requests, urgent.num_requests) + len(helped)
        share, num_blocks = max(tenants.prefill_share, urgent.prefill_share), 0
        if not num_reserved and not share:
            return later
        if helped:
            num_blocks = max(self.ledger.final_blocks(guest) for guest in self._unlimited)
        return replace(
            later,
            num_reserved=num_reserved,
            reserved_share=share + (self._patience.share if helped else 0.0),
            num_reserved_blocks=len(helped) * num_blocks,
        )

    def _forecast_of(self, arrival: Arrival) -> Forecast:
        """Who is refused together has the same before him, and to find out is most of a refusal.

        Kept while nobody comes in or goes; a step in between changes what is in flight.
        """
        moment = arrival.now, arrival.ahead
        if self._forecast is None or moment != self._forecast.moment:
            guests = [request for request in self._charges if not request.terms.is_promised]
            self._unlimited = [guest for guest in guests if guest.terms.rank is Rank.UNLIMITED]
            beside = Guests.of(self.ledger, guests)
            self._forecast = Forecast(self.ledger, self._pricing, *moment, beside)
        return self._forecast

    def _take_in(self, request: Request) -> None:
        terms = request.terms
        cost = _cost(request.num_prompt_tokens, terms.num_planned_tokens)
        self._charges[request], self._forecast = cost, None
        terms.turn = self._tenants.queue(request.tenant, cost, is_promised=terms.is_promised)
        if terms.is_promised:
            self._urgency.begin_promise(request.budget.priority)
            self.ledger.add(request, self._door.place(request), terms.prefill_s)

    def _end_promise(self, request: Request) -> None:
        self._forecast = None
        self.ledger.remove(request)
        self._tenants.end_promise(request.tenant)
        self._urgency.end_promise(request.budget.priority)

    def _prefill_s(self, request: Request) -> float:
        model, context = self._pricing.model, request.num_computed_tokens
        if not model.is_ready:
            return 0.0
        num_tokens = max(0, len(request.token_ids) - context)  # Planned ahead, it is below 0.
        return model.prefill_seconds(num_tokens, context)


def _leaving(reserve: Reserve, arrival: Arrival, kept_for: KeptFor) -> Arrival:
    if not (reserve.num_requests or reserve.prefill_share):
        return arrival
    return replace(
        arrival,
        num_reserved=reserve.num_requests,
        reserved_share=reserve.prefill_share,
        kept_for=kept_for,
    )


def _is_hopeless(arrival: Arrival) -> bool:
    """Whether its prompt alone takes longer than it has, whatever else there is to do."""
    budget = arrival.request.budget
    limits_ms = [limit for limit in (budget.ttft_ms, budget.deadline_ms) if limit is not None]
    return min(limits_ms, default=inf) < 1e3 * arrival.terms.prefill_s


def _has_prompt_left(request: Request) -> bool:
    return len(request.token_ids) - request.num_computed_tokens > 1


def _cost(num_input: int, num_output: int) -> float:
    return INPUT_WEIGHT * num_input + OUTPUT_WEIGHT * num_output
