"""A pipe on a virtual clock: every stage takes exactly what its prices say."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

from shardline_scheduler import (
    BudgetRefused,
    FinishReason,
    LatencyBudget,
    PipeModel,
    Request,
    RequestOutput,
    Scheduler,
    SchedulerConfig,
    SchedulerError,
    StageModel,
    StepLoad,
)
from shardline_scheduler.cost_model import MIN_SAMPLES, RangeModel, scaled_features
from shardline_scheduler.plan import LAST_DRAWN, SamplingParams, StepPlan, StepResult
from shardline_scheduler.regression import NonNegativeFit

from .parts import parts_of

# seconds: fixed, a prefill token, a decode, a token of decode context, of prefill context
Prices = tuple[float, float, float, float, float]
ONE_STAGE: Prices = (10e-3, 0.5e-3, 1e-3, 1e-6, 0.1e-6)
STOP = 1
UNLIMITED = LatencyBudget()


def exact_model(stages: Sequence[Prices]) -> PipeModel:
    """A model that knows what every step takes."""
    return PipeModel([_exact_stage(prices) for prices in stages])


def _exact_stage(prices: Prices) -> StageModel:
    units = [scaled_features(load)[i] for i, load in enumerate(_UNITS)]
    scaled = [price / unit for price, unit in zip(prices, units, strict=True)]
    model = StageModel()
    for part in (model.memory_bound, model.compute_bound):
        part.fit = NonNegativeFit.assuming(scaled)
        part.num_samples = MIN_SAMPLES
    assert isinstance(model.memory_bound, RangeModel)
    return model


_UNITS = (StepLoad(), StepLoad(1), StepLoad(0, 1), StepLoad(0, 0, 1), StepLoad(0, 0, 0, 1))


@dataclass
class Visit:
    """One request from arrival to whatever end it takes."""

    number: int
    arrival: float
    num_prompt: int
    num_output: int
    budget: LatencyBudget = UNLIMITED
    tenant: str = ""
    max_tokens: int | None = None
    prompt: list[int] | None = None
    refusal: SchedulerError | None = None
    token_times: list[float] = field(default_factory=list)
    last: RequestOutput | None = None
    end: float = inf

    @property
    def met(self) -> bool:
        assert self.last is not None and self.last.budget is not None, self
        return self.last.budget.met

    @property
    def is_hopeless(self) -> bool:
        return self.last is not None and self.last.finish_reason is FinishReason.DEADLINE

    def request(self) -> Request:
        """Its number is its seed, by which the machine knows it again."""
        stops = () if self.max_tokens is None else (STOP,)
        sampling = SamplingParams(
            max_tokens=self.max_tokens or self.num_output, seed=self.number, stop_token_ids=stops
        )
        prompt = self.prompt or [self.number] * self.num_prompt
        return Request(str(self.number), prompt, sampling, self.budget, self.tenant)


@dataclass
class Running:
    plan: StepPlan
    end: float


class Machine:
    """Runs a scheduler until all visits are over."""

    def __init__(
        self,
        scheduler: Scheduler,
        stages: Sequence[Prices],
        *,
        noise: Callable[[], float] = lambda: 1.0,
        learns: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.stages = stages
        self.now = 0.0
        self.on_refusal: Callable[[Visit], None] = lambda visit: None
        self._noise = noise
        self._learns = learns
        self._free_at = [0.0] * len(stages)
        self._in_flight: deque[Running] = deque()
        self._visits: dict[int, Visit] = {}
        self._by_index: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._known: dict[int, int] = {}
        self._awaiting: Counter[int] = Counter()
        self._drawn_at: dict[int, float] = {}
        self.beginners: list[int] = []

    def run(self, visits: Iterable[Visit], until: float = inf) -> None:
        """Let all of them come and go."""
        coming = deque(sorted(visits, key=lambda visit: visit.arrival))
        while coming or self.scheduler.has_work:
            self.now = max(self.now, self._next_event(coming))
            if self.now > until:
                return
            while coming and coming[0].arrival <= self.now:
                self.arrive(coming.popleft())
            while self._in_flight and self._in_flight[0].end <= self.now:
                self._commit(self._in_flight.popleft().plan)
            self._go_on()
        self.scheduler.check()
        assert self.scheduler.stats().num_used_kv_blocks == 0

    def arrive(self, visit: Visit) -> None:
        self._visits[visit.number] = visit
        try:
            self.scheduler.add(visit.request(), self.now)
        except BudgetRefused as error:
            visit.refusal, visit.end = error, self.now
            self.on_refusal(visit)

    def lose_everything(self) -> None:
        """A worker dies, and is back at once: what was computed is gone, and what is in flight."""
        self._in_flight.clear()
        self._free_at = [self.now] * len(self.stages)
        self.scheduler.requeue_all(self.now)
        self._go_on()

    def _go_on(self) -> None:
        for output in self.scheduler.expire(self.now):
            self._take(output)
        while (plan := self.scheduler.plan(self.now)) is not None:
            self._submit(plan)

    def _next_event(self, coming: deque[Visit]) -> float:
        times = [visit.arrival for visit in list(coming)[:1]]
        times += [running.end for running in list(self._in_flight)[:1]]
        if (expiry := self.scheduler.next_expiry) < inf:
            times.append(expiry * (1 + 1e-12) + 1e-9)
        assert times, "work, but nothing to wait for"
        return min(times)

    def _submit(self, plan: StepPlan) -> None:
        load, end = StepLoad.of(plan), self.now
        for index in plan.released:
            del self._awaiting[index]
            self._ends.pop(index, None)
        for new in plan.new_requests:
            self._by_index[new.request_index] = new.sampling.seed
            self.beginners.append(new.sampling.seed)
        self._assert_in_order(plan)
        for part in parts_of(plan):
            if LAST_DRAWN in part.token_ids:
                end = max(end, self._drawn_at[part.request_index])
        for i, prices in enumerate(self.stages):
            seconds = _seconds(load, prices) * self._noise()
            end = max(end, self._free_at[i]) + seconds
            self._free_at[i] = end
            if self._learns:
                self.scheduler.observe(plan.step_id, i, seconds)
        self._drawn_at |= dict.fromkeys(plan.request_indexes, end)
        self._in_flight.append(Running(plan, end))

    def _assert_in_order(self, plan: StepPlan) -> None:
        """Chunks follow each other and end where the prompt does; tokens are awaited one by one,
        or two by two where steps are planned ahead.
        """
        most = 1 if self.scheduler.config.plans_ahead else 0
        self._known |= {new.request_index: len(new.token_ids) for new in plan.new_requests}
        for part in parts_of(plan):
            index, end = part.request_index, part.end
            assert self._awaiting[index] <= most, "its token is not back"
            start = self._ends.get(index, part.num_computed_tokens)
            assert start == part.num_computed_tokens, "a chunk is left out or comes twice"
            self._ends[index] = end
            self._known[index] += len(part.token_ids)
            assert part.samples == (end == self._known[index]), "chunks are not the prompt"
            if part.samples:
                self._awaiting[index] += 1

    def _commit(self, plan: StepPlan) -> None:
        indexes = plan.drawing_indexes
        self._awaiting -= Counter(indexes)
        result = StepResult(plan.step_id, [self._draw(index) for index in indexes])
        for output in self.scheduler.commit(result, self.now):
            self._take(output)

    def _draw(self, index: int) -> int:
        visit = self._visits[self._by_index[index]]
        return STOP if len(visit.token_times) + 1 >= visit.num_output else 0

    def _take(self, output: RequestOutput) -> None:
        visit = self._visits[int(output.request_id)]
        visit.token_times += [self.now] * len(output.token_ids)
        if output.finish_reason is not None:
            visit.last, visit.end = output, self.now


def _seconds(load: StepLoad, prices: Prices) -> float:
    features = (
        1,
        load.num_prefill_tokens,
        load.num_decodes,
        load.decode_context,
        load.prefill_context,
    )
    return sum(price * feature for price, feature in zip(prices, features, strict=True))


def machine(
    stages: Sequence[Prices] = (ONE_STAGE,), *, model: PipeModel | None = None, **settings: object
) -> Machine:
    """A scheduler that knows the machine, and the machine."""
    defaults = {
        "num_blocks": 4000,
        "block_size": 16,
        "max_model_len": 4096,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "max_num_waiting": 5000,
    }
    config = SchedulerConfig(num_stages=len(stages), **defaults | settings)  # type: ignore[arg-type]
    scheduler = Scheduler(config, cost_model=model or exact_model(stages))
    return Machine(scheduler, stages)
