"""The scheduler: requests come in, plans go out, results come back.

Catch-up scheduling: a step gives a request min(tokens it still has to compute, what the step can
afford). A chunk of a prompt, what a prefix hit leaves over, a decode and the replay after a
preemption are the same line.

Several plans may be in flight. `num_computed_tokens` moves when a plan is made, so chunks of one
request may follow each other at once; a decode waits for its token, unless `plans_ahead` lets the
next one be planned while it is drawn. Workers execute plans strictly in order, and results are
committed in that order.

A request that ends by a token was perhaps planned ahead once more: it leaves at once, and what that
step draws for it is dropped.

A request_index is current from the plan that introduces it until its request finishes, is
preempted or is aborted, and is never used again. A token or logprob that comes back for an index
that is not current any more is dropped. Nothing is lost by it: a preempted request has its earlier
tokens, was never told the dropped one, and draws it again, with the same seed and token index.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from math import inf

from .accuracy import StepLog
from .budget import BudgetOutcome, OnMiss
from .config import SchedulerConfig
from .cost import StepCost, StepLoad, TokenBudget
from .cost_model import PipeModel
from .errors import BudgetRefused, DuplicateRequest, QueueFull, RequestTooLong
from .keeper import BudgetKeeper, Keeper, NoBudgets
from .leaving import late_requests
from .outcome import Outcomes, outcome_of
from .outputs import RequestOutput, SchedulerStats
from .pipe_clock import PipeClock
from .plan import StepPlan, StepResult, TokenLogprobs
from .planner import Planner
from .policy import POLICIES, Policy
from .request import FinishReason, Request, RequestState
from .seating import Seating
from .verdict import Ahead

MAX_STRIKES = 2
_RUNNING = RequestState.RUNNING


@dataclass(slots=True, frozen=True)
class _InFlight:
    """What is remembered of a plan until its result comes. `is_alone` if the pipe was empty.

    Tokens are drawn for the `drawers`, whose indexes were `drawing_indexes` then.
    """

    step_id: int
    drawers: list[Request]
    drawing_indexes: list[int]
    load: StepLoad
    planned_at: float
    is_alone: bool


class Scheduler:
    """Decides what every step computes. Time is an argument, in seconds, and never runs back.

    Budgets are kept by `cost_model`, which learns from `observe`; `cost` limits steps in its place
    where the policy keeps none. `jitter` gives numbers from 0 on, by whose part it is longer until
    those may retry who are refused.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        policy: Policy | None = None,
        cost: StepCost | None = None,
        cost_model: PipeModel | None = None,
        jitter: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.config = config
        self._policy = policy or POLICIES[config.policy]()
        self._cost = cost
        self._jitter = jitter
        self._plans_ahead = config.plans_ahead
        self._seating = seating = Seating(config, self._policy)
        self._memory, self._waiting, self._running = (
            seating.memory,
            seating.waiting,
            seating.running,
        )
        self._learn(cost_model or PipeModel.of_size(config.num_stages))
        self._requests: dict[str, Request] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._sequences = count()
        self._num_steps = 0
        self._now = float("-inf")

    def _learn(self, model: PipeModel) -> None:
        """Begin with this model, and with nothing counted."""
        self.cost_model = model
        self._log = StepLog(model)
        self._clock = PipeClock(model)
        self._outcomes = Outcomes()
        if self._policy.keeps_budgets and self._cost is None:
            self._plan_with(BudgetKeeper(self.config, self._policy, model, self._jitter))
        else:
            self._plan_with(self._no_budgets())

    def _no_budgets(self) -> Keeper:
        return NoBudgets(self._cost or TokenBudget(self.config.max_num_batched_tokens))

    def _plan_with(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._planner = Planner(self.config, self._policy, keeper, self.cost_model, self._seating)

    @property
    def has_requests(self) -> bool:
        """Whether any request is alive."""
        return bool(self._requests)

    @property
    def has_work(self) -> bool:
        """Whether there is anything to plan or to commit."""
        return bool(self._requests or self._in_flight)

    @property
    def num_in_flight(self) -> int:
        """Plans whose results are not committed yet."""
        return len(self._in_flight)

    def add(self, request: Request, now: float) -> None:
        """Take a request in; raises a SchedulerError if it is not."""
        self._set_time(now)
        if request.request_id in self._requests:
            raise DuplicateRequest(request.request_id)
        num_prompt_tokens, max_tokens = request.num_prompt_tokens, request.sampling.max_tokens
        if num_prompt_tokens + max_tokens > self.config.max_request_tokens:
            limit = self.config.max_request_tokens
            raise RequestTooLong(num_prompt_tokens, max_tokens, limit)
        if len(self._waiting) >= self.config.max_num_waiting:
            raise QueueFull(len(self._waiting), self.config.max_num_waiting)
        request.arrival_time = now
        request.sequence = next(self._sequences)
        num_cached_tokens = len(self._memory.find_prefix(request)) * self.config.block_size
        try:
            self._keeper.admit(request, now, num_cached_tokens, self._ahead())
        except BudgetRefused:
            self._outcomes.count_refused(request.budget)
            raise
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks at once; False if it is not alive. No output."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._remove(request)
        return True

    def plan(self, now: float) -> StepPlan | None:
        """The next step, to be executed after all earlier ones.

        None while `in_flight_limit` plans are in flight, or while nothing can be computed before
        a result is committed or a request is added.
        """
        self._set_time(now)
        if len(self._in_flight) >= self.config.in_flight_limit:
            return None
        step = self._planner.fill(self._num_steps, now, self._ahead())
        if not len(step):
            return None
        self._num_steps += 1
        self._log.put(step.step_id, step.load)
        self._clock.plan(step.step_id, step.load, now, step.reads)
        # Released indexes wait for a plan with work in it: they cost an idle worker little, and
        # they are at most as many as were running.
        plan, is_alone = step.complete(self._seating.take_released()), not self._in_flight
        self._in_flight.append(
            _InFlight(plan.step_id, step.drawers, plan.drawing_indexes, step.load, now, is_alone)
        )
        return plan

    def commit(self, result: StepResult, now: float) -> list[RequestOutput]:
        """Take in the result of the oldest plan in flight; returns the news."""
        self._set_time(now)
        expected = self._in_flight.popleft()
        assert result.step_id == expected.step_id, f"{result.step_id} instead of {expected}"
        num_drawn = len(result.token_ids)
        assert num_drawn == len(expected.drawers), f"{num_drawn} tokens for {expected}"
        self._clock.commit(result.step_id, now)
        if expected.is_alone:
            self.cost_model.observe_trip(expected.load, now - expected.planned_at)
        prompt_logprobs: dict[Request, Sequence[TokenLogprobs]] = {}
        for piece in result.prompt_logprobs:
            request = self._running.get(piece.request_index)
            if request is not None and (news := request.accept_prompt_logprobs(piece)):
                prompt_logprobs[request] = news
        outputs = self._take_tokens(expected, result, prompt_logprobs, now)
        for request, accepted in prompt_logprobs.items():
            outputs.append(RequestOutput.of(request, (), (), accepted, None))
        return outputs

    def observe(self, step_id: int, stage_index: int, seconds: float) -> None:
        """What a step really took of a stage, waiting aside; planned not too long ago."""
        self._log.observe(step_id, stage_index, seconds)

    @property
    def next_expiry(self) -> float:
        """When `expire` may have something to tell; infinity if there is nothing to wait for."""
        return self._keeper.next_expiry

    def expire(self, now: float) -> list[RequestOutput]:
        """End the requests whose budget is hard and cannot be kept any more; soft ones step back
        behind everybody whose can.
        """
        self._set_time(now)
        outputs = []
        for request in self._keeper.pop_hopeless(now):
            if request.budget.on_miss is OnMiss.DEGRADE:
                self._degrade(request)
                continue
            outcome = outcome_of(request, now, is_complete=False)
            self._remove(request)
            self._outcomes.count(request.budget, outcome)
            outputs.append(RequestOutput.of(request, (), (), (), FinishReason.DEADLINE, outcome))
        return outputs

    def late_at(self, deadline: float, now: float) -> list[Request]:
        """The requests that will not be done by `deadline`."""
        return late_requests(self._requests.values(), deadline, now)

    @property
    def seconds_in_flight(self) -> float:
        """What the plans in flight take, one after the other; infinity while nobody can tell."""
        if not self.cost_model.is_ready:
            return inf
        return sum(self.cost_model.trip_seconds(step.load) for step in self._in_flight)

    def strike(self, request_indexes: Iterable[int]) -> list[Request]:
        """A worker died in the step of these, or several at once; returns those that this has
        happened to twice.

        Until it gets its next token, a request with a strike shares a step with no other such one:
        so the second death is told from bad company.
        """
        guilty = []
        for index in dict.fromkeys(request_indexes):
            if (request := self._running.get(index)) is not None:
                request.num_strikes += 1
                if request.num_strikes == MAX_STRIKES:
                    guilty.append(request)
        return guilty

    def requeue_all(self, now: float) -> None:
        """All KV is lost, and every plan in flight with it: everybody computes again what he has.

        Nothing of an earlier plan may be committed any more; step ids and indexes go on counting.
        """
        self._set_time(now)
        for request in list(self._running):
            self._seating.restart(request, num_cached_tokens=0)
            self._keeper.restart(request)
        self._seating.take_released()
        self._in_flight.clear()
        self._clock.clear()
        self._memory.forget_prefixes()

    def start_over(self, cost_model: PipeModel) -> None:
        """What was computed until now was for measuring: forget contents, totals and lengths, and
        go on with what was learnt. Nobody is alive and nothing in flight.
        """
        assert not self.has_work, "requests are alive"
        self._learn(cost_model)
        self._memory.forget_prefixes()
        self._memory.num_prefix_queries = self._memory.num_prefix_hits = 0

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """What is computed meanwhile is for measuring: it is planned without budgets, counts for
        nobody's share, and is dropped at the end. Before, nobody is alive and nothing in flight.
        """
        assert not self.has_work, "requests are alive"
        keeper, memory = self._keeper, self._memory
        num_queries, num_hits = memory.num_prefix_queries, memory.num_prefix_hits
        self._plan_with(self._no_budgets())
        try:
            yield
        finally:
            for request_id in list(self._requests):
                self.abort(request_id)
            self._plan_with(keeper)
            memory.num_prefix_queries, memory.num_prefix_hits = num_queries, num_hits

    def stats(self) -> SchedulerStats:
        """Gauges and totals, as of now."""
        memory, pool = self._memory, self._memory.pool
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_kv_blocks=pool.num_blocks,
            num_used_kv_blocks=pool.num_used,
            num_cached_kv_blocks=pool.num_cached,
            num_preemptions=self._seating.num_preemptions,
            num_prefix_queries=memory.num_prefix_queries,
            num_prefix_hits=memory.num_prefix_hits,
            num_steps=self._num_steps,
            num_in_flight=len(self._in_flight),
            classes=self._outcomes.by_class(),
            accuracy=self._log.accuracy,
        )

    def check(self) -> None:
        """Assert that no block leaks and no request is orphaned; linear in blocks and requests."""
        self._memory.check(self._requests.values())
        self._running.check()
        self._keeper.check()
        waiting = list(self._waiting)
        assert len(waiting) == len(self._waiting), "the waiting queue miscounts"
        for request in waiting:
            assert not (request.block_table or request.num_computed_tokens), "has begun, yet waits"
        alive = {request.request_id for request in (*waiting, *self._running)}
        assert alive == self._requests.keys(), f"orphans: {alive ^ self._requests.keys()}"
        assert self._in_flight or not any(request.is_token_in_flight for request in self._running)

    def _set_time(self, now: float) -> None:
        assert now >= self._now, f"time runs back from {self._now} to {now}"
        self._now = now

    def _ahead(self) -> Ahead:
        back_in = self._clock.back_in(self._now)
        if not back_in or not self.cost_model.is_ready:
            return Ahead()
        is_full = len(back_in) >= self.config.in_flight_limit
        return Ahead(back_in[0] if is_full else 0.0, back_in[-1], tuple(back_in[-2::-1]))

    def _take_tokens(
        self,
        drawn: _InFlight,
        result: StepResult,
        prompt_logprobs: dict[Request, Sequence[TokenLogprobs]],
        now: float,
    ) -> list[RequestOutput]:
        """Take in the tokens of a step, each with what there is of its prompt's logprobs.

        One loop over all of them, thousands of times a second in a busy server.
        """
        outputs: list[RequestOutput] = []
        going_on: list[Request] = []
        may_fill_block: list[Request] = []
        logprobs, plans_ahead = result.logprobs, self._plans_ahead
        block_size = self.config.block_size
        for request, index, token_id in zip(
            drawn.drawers, drawn.drawing_indexes, result.token_ids, strict=True
        ):
            if request.request_index != index or request.state is not _RUNNING:
                continue
            outcome: BudgetOutcome | None = None
            finish_reason = request.append(token_id, now)
            num_known = len(request.token_ids)
            num_tokens = num_known - request.num_prompt_tokens
            if finish_reason is not None:
                outcome = self._finish(request, now)
            else:
                going_on.append(request)
                if plans_ahead and not num_known % block_size:
                    may_fill_block.append(request)
                if num_tokens == 1 or num_tokens == request.terms.num_planned_tokens:
                    self._keeper.take_token(request)
            outputs.append(
                RequestOutput(
                    request.request_id,
                    num_tokens - 1,
                    (token_id,),
                    (logprobs[index],) if index in logprobs else (),
                    prompt_logprobs.pop(request, ()) if prompt_logprobs else (),
                    finish_reason,
                    request.num_cached_tokens,
                    outcome,
                )
            )
        self._running.take_tokens(going_on)
        self._memory.register_late(may_fill_block)
        return outputs

    def _finish(self, request: Request, now: float) -> BudgetOutcome:
        """Its last token has come; how its budget was kept."""
        self._remove(request, is_complete=True)
        outcome = outcome_of(request, now, is_complete=True)
        self._outcomes.count(request.budget, outcome)
        return outcome

    def _degrade(self, request: Request) -> None:
        """Its budget is lost: from now on it gets what others leave over."""
        if request.state is RequestState.RUNNING:
            self._running.end_promise(request)
        self._keeper.degrade(request)
        if request.state is RequestState.WAITING:
            self._waiting.move(request)

    def _remove(self, request: Request, *, is_complete: bool = False) -> None:
        was_waiting = request.state is RequestState.WAITING
        request.state = RequestState.FINISHED
        del self._requests[request.request_id]
        if was_waiting:
            self._waiting.drop(request)
        else:
            self._seating.release(request)
        self._keeper.remove(request, is_complete=is_complete)
