"""How latency budgets take part in scheduling: at arrival, in every step, and when all is lost."""

from collections.abc import Callable
from math import inf
from typing import Protocol

from .admission import Admission
from .capacity import Pricing
from .config import SchedulerConfig
from .cost import StepCost, StepLoad
from .cost_model import PipeModel
from .expiry import Expiries
from .policy import Policy
from .request import Request
from .target import DECODES_STRETCH, Prompts, TimeTarget
from .verdict import Ahead

# Guests may delay promised prompts by a step while everybody is early by so many steps.
_SLACK_STEPS = 4


class Keeper(Protocol):
    """Told of everything that happens to a request, asked what a step may hold."""

    cost: StepCost

    @property
    def next_expiry(self) -> float:
        """When `pop_hopeless` may have something; infinity if there is nothing to wait for."""
        ...

    def admit(self, request: Request, now: float, num_cached_tokens: int, ahead: Ahead) -> None:
        """A request arrives; raises a BudgetRefused where it is not taken in."""
        ...

    def start(self, request: Request) -> None:
        """It begins to run."""
        ...

    def progress(self, request: Request) -> None:
        """A chunk of its prompt has been planned."""
        ...

    def take_token(self, request: Request) -> None:
        """Its first token has come, or the last one that was planned; and it goes on."""
        ...

    def restart(self, request: Request) -> None:
        """It has lost what was computed."""
        ...

    def remove(self, request: Request, *, is_complete: bool) -> None:
        """It is over."""
        ...

    def degrade(self, request: Request) -> None:
        """It is a guest from now on."""
        ...

    def promise_starving(self, now: float, ahead: Ahead) -> Request | None:
        """A guest who is promised something from now on, if there is one whose time it is."""
        ...

    def pop_hopeless(self, now: float) -> list[Request]:
        """Promised requests that cannot keep their budgets any more, once each."""
        ...

    def guest_limit_s(self, load: StepLoad, now: float, has_promised_decodes: bool) -> float:
        """How long a step with these promised decodes may become by adding decodes of guests;
        `has_promised_decodes` is whether there are any, in this step or in one that is in flight.
        """
        ...

    def aim(self, load: StepLoad, now: float, prompts: Prompts) -> None:
        """A step holds its decodes, and may take of these prompts."""
        ...

    def check(self) -> None:
        """Assert that nothing is counted that is over."""
        ...


class NoBudgets:
    """Everybody is a guest, and steps are as large as `cost` says."""

    next_expiry = inf

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost

    def admit(self, request: Request, now: float, num_cached_tokens: int, ahead: Ahead) -> None:
        """Whoever comes."""

    def start(self, request: Request) -> None:
        """Nothing to do."""

    def progress(self, request: Request) -> None:
        """Nothing to do."""

    def take_token(self, request: Request) -> None:
        """Nothing to do."""

    def restart(self, request: Request) -> None:
        """Nothing to do."""

    def remove(self, request: Request, *, is_complete: bool) -> None:
        """Nothing to do."""

    def degrade(self, request: Request) -> None:
        """Nothing to do."""

    def promise_starving(self, now: float, ahead: Ahead) -> Request | None:
        """Nobody: everybody is a guest."""
        return None

    def pop_hopeless(self, now: float) -> list[Request]:
        """Nobody: late is late."""
        return []

    def guest_limit_s(self, load: StepLoad, now: float, has_promised_decodes: bool) -> float:
        """No limit."""
        return inf

    def aim(self, load: StepLoad, now: float, prompts: Prompts) -> None:
        """Nothing to do."""

    def check(self) -> None:
        """Nothing to check."""


class BudgetKeeper:
    """Keeps budgets by the cost model. While that has not been measured, nobody is refused."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        model: PipeModel,
        jitter: Callable[[], float],
    ) -> None:
        self._pricing = Pricing(
            model,
            config.num_shares,
            config.max_num_batched_tokens,
            num_in_flight=config.in_flight_limit,
        )
        self._admission = Admission(config, self._pricing, policy, jitter)
        self._expiries = Expiries(model, config.num_trips_at_once)
        self._target = TimeTarget(self._pricing)
        self.cost: StepCost = self._target

    @property
    def next_expiry(self) -> float:
        """When the next budget may turn out to be lost."""
        return self._expiries.next_time

    def admit(self, request: Request, now: float, num_cached_tokens: int, ahead: Ahead) -> None:
        """Promise it its budget, make it a guest, or raise a BudgetRefused."""
        self._admission.admit(request, now, num_cached_tokens, ahead)
        if request.terms.is_promised:
            self._expiries.watch(request)

    def start(self, request: Request) -> None:
        """It begins to run."""
        self._admission.start(request)

    def progress(self, request: Request) -> None:
        """A chunk of its prompt has been planned."""
        self._admission.progress(request)

    def take_token(self, request: Request) -> None:
        """Look for what its later tokens are bound by, from the first one on."""
        if request.num_output_tokens == request.terms.num_planned_tokens:
            self._admission.outgrow(request)
        if request.num_output_tokens == 1 and request.terms.is_promised:
            self._expiries.watch(request)

    def restart(self, request: Request) -> None:
        """It has lost what was computed, and may have become hopeless by it."""
        self._admission.restart(request)
        if request.terms.is_promised:
            self._expiries.watch(request)

    def remove(self, request: Request, *, is_complete: bool) -> None:
        """It is over."""
        self._admission.remove(request, is_complete=is_complete)

    def degrade(self, request: Request) -> None:
        """It is a guest from now on."""
        self._admission.degrade(request)

    def promise_starving(self, now: float, ahead: Ahead) -> Request | None:
        """One who has not got on for seconds, while others are promised all there is."""
        return self._admission.promise_starving(now, ahead)

    def pop_hopeless(self, now: float) -> list[Request]:
        """Those that cannot make it any more, by what an empty server would need."""
        return self._expiries.pop_hopeless(now)

    def guest_limit_s(self, load: StepLoad, now: float, has_promised_decodes: bool) -> float:
        """What promised decodes and promised prompts leave of a step, as `aim` will have it."""
        ledger, pricing = self._admission.ledger, self._pricing
        if not len(ledger) or not pricing.model.is_ready:
            return inf
        if not len(ledger.demand):
            return pricing.longest_step_s(ledger.seconds_per_token, load)
        limit = ledger.seconds_per_token if has_promised_decodes else inf
        step_s = min(ledger.step_s, pricing.longest_step_s(limit, load))
        capacity = pricing.capacity(step_s, load, ledger.longest_prompt)
        if capacity.work <= 0:
            return 0.0
        slack_s = _SLACK_STEPS * pricing.max_in_flight * step_s
        if ledger.demand.is_early(pricing.pace(capacity, now), by_s=slack_s):
            return step_s
        return step_s - min(capacity.work, ledger.demand.work)

    def aim(self, load: StepLoad, now: float, prompts: Prompts) -> None:
        """The time found at admission while prompts are promised; else what suits decodes."""
        ledger, pricing = self._admission.ledger, self._pricing
        if not pricing.model.is_ready or not prompts.count:
            return
        limit = ledger.seconds_per_token if prompts.has_promised_decodes else inf
        longest_s = pricing.longest_step_s(limit, load)
        self._target.insist(always=not prompts.has_promised_decodes)
        if len(ledger.demand):
            self._target.keep(min(ledger.step_s, longest_s))
        else:
            # Or prompts would wait for as long as there are decodes.
            least_s = DECODES_STRETCH * pricing.model.step_seconds(load)
            guard_s = max(least_s, ledger.guard_s(now, pricing.max_in_flight))
            longest_s = min(longest_s, guard_s)
            self._target.aim(load, longest_s, prompts)

    def check(self) -> None:
        """Assert that nothing is counted that is over."""
        self._admission.check()
