"""One replica: the scheduler that serves, on a virtual clock, before a pipe of numbers."""

from array import array
from collections import deque
from copy import deepcopy
from dataclasses import dataclass, field
from math import inf

from shardline_scheduler import (
    BudgetOutcome,
    FinishReason,
    LatencyBudget,
    PipeModel,
    Request,
    RequestOutput,
    Scheduler,
    SchedulerConfig,
    SchedulerError,
    StepLoad,
)
from shardline_scheduler.plan import LAST_DRAWN, SamplingParams, StepPlan, StepResult
from shardline_server.simulate.virtual_pipe import Noise, VirtualPipe

_STOP, _WORD = 1, 0
# Budgets are lost just after their time, not at it.
_AFTER = 1e-9


@dataclass(slots=True)
class Visit:
    """One request from its arrival to its end. `max_tokens` is what the client allows, of which it
    will use `num_output_tokens`; the scheduler does not know the second number.
    """

    number: int
    arrival_s: float
    prompt: list[int]
    num_output_tokens: int
    max_tokens: int
    budget: LatencyBudget = field(default_factory=LatencyBudget)
    tenant: str = ""
    token_times_s: "array[float]" = field(default_factory=lambda: array("d"))
    end_s: float = inf
    finish_reason: FinishReason | None = None
    outcome: BudgetOutcome | None = None
    refusal: SchedulerError | None = None

    def request(self) -> Request:
        """For the scheduler; the number is its seed, by which the worker's part knows it again."""
        sampling = SamplingParams(
            max_tokens=self.max_tokens, seed=self.number, stop_token_ids=(_STOP,)
        )
        return Request(str(self.number), self.prompt, sampling, self.budget, self.tenant)

    def next_token(self) -> int:
        """What the model draws."""
        is_last = len(self.token_times_s) + 1 >= self.num_output_tokens
        return _STOP if is_last else _WORD


@dataclass(frozen=True, slots=True)
class _InFlight:
    plan: StepPlan
    ended_at: float
    heard_at: float


class Replica:
    """Takes visits in, and moves on at the times that it asks for.

    Steps take what `model` says, times the noise; `known` is what the scheduler knows of that.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        model: PipeModel,
        noise: Noise,
        start: float = 0.0,
        known: PipeModel | None = None,
    ) -> None:
        # A copy, since the scheduler learns how long trips take.
        self.scheduler = Scheduler(config, cost_model=deepcopy(known or model))
        self.pipe = VirtualPipe(model, noise, start)
        self.num_open = 0
        self.num_waiting_tokens = 0
        self.num_computed_tokens = 0
        self._visits: dict[int, Visit] = {}
        self._by_index: dict[int, int] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._drawn_at: dict[int, float] = {}

    @property
    def next_time(self) -> float:
        """When it has something to do; infinity if it waits for visits."""
        heard_at = self._in_flight[0].heard_at if self._in_flight else inf
        return min(heard_at, self.scheduler.next_expiry + _AFTER)

    @property
    def num_stages(self) -> int:
        """One behind the other."""
        return self.scheduler.config.num_stages

    def arrive(self, visit: Visit, now: float) -> None:
        """A visit comes; it may be refused at once."""
        self.pipe.accounting.woke(now)
        try:
            self.scheduler.add(visit.request(), now)
        except SchedulerError as error:
            visit.refusal, visit.end_s = error, now
        else:
            self._visits[visit.number] = visit
            self.num_open += 1
            self.num_waiting_tokens += len(visit.prompt)
        self._plan(now)

    def advance(self, now: float) -> None:
        """A turn of the engine's loop."""
        self.pipe.accounting.woke(now)
        while self._in_flight and self._in_flight[0].heard_at <= now:
            self._commit(self._in_flight.popleft(), now)
        for output in self.scheduler.expire(now):
            self._take(output, now)
        self._plan(now)

    def finish_time(self, visit: Visit, now: float) -> float:
        """When its last token may be expected, by the cost model and what is here already."""
        model, config = self.scheduler.cost_model, self.scheduler.config
        num_decodes = -(-(self.num_open + 1) // config.num_shares)
        load = StepLoad(0, num_decodes, num_decodes * len(visit.prompt), 0)
        token_s = max(
            config.num_shares * model.expected_step_seconds(load),
            model.gap_seconds(model.expected_trip_seconds(load), config.num_trips_at_once),
        )
        num_tokens = self.num_waiting_tokens + len(visit.prompt)
        prefill_s = model.expected_prefill_seconds(num_tokens, 0)
        return now + prefill_s + visit.num_output_tokens * token_s

    def check(self) -> None:
        """Assert that nothing is left over when all visits are over."""
        self.scheduler.check()
        assert not self.scheduler.has_work, "somebody is still here"
        assert self.num_open == self.num_waiting_tokens == 0
        assert self.scheduler.stats().num_used_kv_blocks == 0

    def _plan(self, now: float) -> None:
        while (plan := self.scheduler.plan(now)) is not None:
            load, drawn_at = self._load_of(plan), self._drawn_by(plan)
            ended_at = self.pipe.submit(plan.step_id, load, now, drawn_at)
            self._drawn_at |= dict.fromkeys(plan.request_indexes, ended_at)
            self._in_flight.append(_InFlight(plan, ended_at, self.pipe.heard_at(ended_at)))
        self.pipe.accounting.settled(self.scheduler.has_work, now)

    def _load_of(self, plan: StepPlan) -> StepLoad:
        for index in plan.released:
            del self._by_index[index], self._drawn_at[index]
        for new in plan.new_requests:
            self._by_index[new.request_index] = new.sampling.seed
        load = StepLoad.of(plan)
        self.num_computed_tokens += load.num_tokens
        return load

    def _drawn_by(self, plan: StepPlan) -> float:
        """When the last of the tokens is drawn that it reads, and the scheduler does not know."""
        decodes = zip(plan.decodes.request_indexes, plan.decodes.token_ids, strict=True)
        drawn_at = [self._drawn_at[index] for index, token in decodes if token == LAST_DRAWN]
        return max(drawn_at, default=0.0)

    def _commit(self, done: _InFlight, now: float) -> None:
        self.pipe.accounting.heard(self.num_stages - 1, done.ended_at, now)
        token_ids = [self._draw(index) for index in done.plan.drawing_indexes]
        for output in self.scheduler.commit(StepResult(done.plan.step_id, token_ids), now):
            self._take(output, now)

    def _draw(self, request_index: int) -> int:
        """Of a request that has ended meanwhile, whatever: nobody will hear it."""
        visit = self._visits.get(self._by_index.get(request_index, -1))
        return _WORD if visit is None else visit.next_token()

    def _take(self, output: RequestOutput, now: float) -> None:
        number = int(output.request_id)
        visit = self._visits[number]
        had_tokens = bool(visit.token_times_s)
        visit.token_times_s.extend([now] * len(output.token_ids))
        if not had_tokens and (visit.token_times_s or output.finish_reason is not None):
            self.num_waiting_tokens -= len(visit.prompt)
        if output.finish_reason is not None:
            visit.finish_reason, visit.outcome = output.finish_reason, output.budget
            visit.end_s = now
            self.num_open -= 1
            del self._visits[number]
