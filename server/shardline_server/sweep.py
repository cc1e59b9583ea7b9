"""Measuring how long steps of several sizes take: for some seconds before the first request, or a
little at a time while there is nothing else to do.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from shardline_scheduler import Request, Sample, Scheduler, SchedulerConfig, StepLoad
from shardline_scheduler.cost_model import MIN_SAMPLES
from shardline_scheduler.plan import SamplingParams, StageTiming, StepResult
from shardline_server.worker_group import WorkerGroup
from shardline_shards.messages import StageReport

logger = logging.getLogger("shardline.engine")

_REPORTS_TAKE_S = 2.0
_ENOUGH_STEPS = 2 * MIN_SAMPLES
_CHECK_INTERVAL_MS = 200
_PATIENT_ROUNDS = 2
# Shared prompts come in such parts: as many steps behind longer and longer contexts, at the price
# of one that says little.
_PART = 64
_STEP_TAKES_S = 10.0  # nothing is known yet; ten times that is allowed


@dataclass(frozen=True, slots=True)
class Shape:
    """`count` prompts of `num_tokens` tokens that come together, and the tokens that each says.

    The first `num_shared` tokens are those of another prompt that has been computed before. Another
    one of `num_beside` tokens comes when they decode.
    """

    num_tokens: int
    count: int = 1
    num_outputs: int = 1
    num_shared: int = 0
    num_beside: int = 0

    @property
    def num_own(self) -> int:
        """Tokens of each prompt that are computed."""
        return self.num_tokens - self.num_shared


# In the order of what is missed most; a slow machine gets through a few of them only.
SHAPES = (
    Shape(8, count=4, num_outputs=4),
    Shape(64),
    Shape(8, num_outputs=4),
    # Decodes far behind their beginnings: what they read would else be told from their number by
    # noise alone, and priced at anything.
    Shape(264, count=16, num_outputs=4, num_shared=256, num_beside=64),
    Shape(320, num_shared=256),
    Shape(256),
    Shape(8, count=16, num_outputs=4),
    Shape(128),
    Shape(64, count=4, num_outputs=4),
    Shape(32),
    Shape(8, count=32, num_outputs=4),
    Shape(264, count=32, num_outputs=4, num_shared=256),
)


def shapes_for(config: SchedulerConfig) -> list[Shape]:
    """Those that such a scheduler has room for, each in steps of its own."""
    return [shape for shape in SHAPES if _fits(shape, config)]


def _fits(shape: Shape, config: SchedulerConfig) -> bool:
    num_tokens = shape.num_tokens + shape.num_outputs
    num_requests = shape.count + (shape.num_beside > 0)
    num_blocks = num_requests * (-(-num_tokens // config.block_size) + 1)
    most_at_once = max(shape.num_own * shape.count, shape.count + shape.num_beside)
    return (
        num_tokens <= config.max_request_tokens
        and num_blocks <= config.num_blocks
        and num_requests <= min(config.max_num_seqs, config.max_num_waiting)
        and most_at_once <= config.max_num_batched_tokens
    )


@dataclass(slots=True)
class Measurements:
    """What came of a sweep: samples of each stage, and of each step's way through all of them."""

    samples: list[list[Sample]]
    trips: list[tuple[StepLoad, float]] = field(default_factory=list)


class Interrupted(Exception):
    """Somebody wants to be served."""


class Sweep:
    """Sends throw-away requests through an idle scheduler, one step in flight at a time.

    After each step `is_called` says whether it should make way; if it is called at every turn, the
    third time it goes on to the end of a shape. Raises WorkerLost.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        workers: WorkerGroup,
        vocab_size: int,
        is_called: Callable[[], bool] = lambda: False,
    ) -> None:
        self._scheduler = scheduler
        self._workers = workers
        self._vocab_size = vocab_size
        self._is_called = is_called
        self._shapes = shapes_for(scheduler.config)
        self._num_shapes_tried = 0
        self._random = random.Random(0)
        self._loads: dict[int, StepLoad] = {}
        self._timings: list[StageTiming] = []
        self._trips: dict[int, float] = {}
        self._num_requests = 0

    def run(self, seconds: float) -> Measurements:
        """Measure until the time is over or every shape came three times; somewhat longer if that
        is too little to learn from.

        The first step of each kind of load is left out: memory has to be touched and kernels be
        chosen.
        """
        started = time.monotonic()
        for _ in range(3 * len(self._shapes)):
            elapsed = time.monotonic() - started
            if elapsed >= seconds and (len(self._loads) >= _ENOUGH_STEPS or elapsed >= 3 * seconds):
                break
            self.run_next()
        return self.finish()

    def run_next(self) -> None:
        """Measure one more shape, or what of it nobody interrupts."""
        shape = self._shapes[self._num_shapes_tried % len(self._shapes)]
        self._num_shapes_tried += 1
        with suppress(Interrupted):
            self._run(shape)

    def finish(self) -> Measurements:
        """What has been measured; the last reports of stages take a tenth of a second."""
        self._await_reports()
        return self._measurements()

    @property
    def is_complete(self) -> bool:
        """Whether there is enough to learn from, of prompts and of decodes."""
        num_decodes = sum(load.num_decodes > 0 for load in self._loads.values())
        num_prompts = sum(load.num_prefill_tokens > 0 for load in self._loads.values())
        is_round_over = self._num_shapes_tried >= len(self._shapes)
        return is_round_over and min(num_decodes, num_prompts) >= MIN_SAMPLES

    def _run(self, shape: Shape) -> None:
        shared = self._prompt(shape.num_shared)
        if self._scheduler.config.enable_prefix_cache:
            for end in range(_PART, shape.num_shared + 1, _PART):
                self._add(shared[:end], 1)
                self._finish()
        for _ in range(shape.count):
            prompt = shared + self._prompt(shape.num_own)
            self._add(prompt, shape.num_outputs)
        if shape.num_beside:
            self._step()
            self._add(self._prompt(shape.num_beside), 1)
        self._finish()

    def _prompt(self, num_tokens: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(num_tokens)]

    def _add(self, prompt: Sequence[int], num_outputs: int) -> None:
        self._num_requests += 1
        sampling = SamplingParams(max_tokens=num_outputs, seed=0, temperature=0.0)
        request = Request(f"sweep-{self._num_requests}", list(prompt), sampling)
        self._scheduler.add(request, time.monotonic())

    def _finish(self) -> None:
        while self._scheduler.has_requests:
            self._step()

    def _step(self) -> None:
        plan = self._scheduler.plan(time.monotonic())
        assert plan is not None
        self._loads[plan.step_id] = StepLoad.of(plan)
        started = time.monotonic()
        self._workers.submit(plan)
        result = self._await_result()
        self._trips[plan.step_id] = time.monotonic() - started
        self._scheduler.commit(result, time.monotonic())
        if self._scheduler.has_requests and self._has_to_make_way():
            raise Interrupted

    def _has_to_make_way(self) -> bool:
        is_patient = self._num_shapes_tried <= _PATIENT_ROUNDS * len(self._shapes)
        return is_patient and self._is_called()

    def _await_result(self) -> StepResult:
        while True:
            for message in self._messages(lambda: True):
                if isinstance(message, StepResult):
                    return message

    def _await_reports(self) -> None:
        """Stages before the last report several steps at once, and late."""
        num_expected = len(self._loads) * self._scheduler.config.num_stages
        deadline = time.monotonic() + _REPORTS_TAKE_S
        for _ in self._messages(
            lambda: len(self._timings) < num_expected and time.monotonic() < deadline
        ):
            pass

    def _messages(self, is_wanted: Callable[[], bool]) -> Iterator[StepResult | StageReport]:
        """What workers say, as long as it is wanted; their timings are kept."""
        while is_wanted():
            if not self._workers.poll(_CHECK_INTERVAL_MS):
                self._check_workers()
                continue
            for message in self._workers.results():
                self._keep(message)
                yield message

    def _check_workers(self) -> None:
        """Raises WorkerLost for who has died, is stopped, or hangs."""
        self._workers.check()
        self._workers.check_forming()
        self._workers.check_hang(_STEP_TAKES_S)

    def _keep(self, message: StepResult | StageReport) -> None:
        timings = message.timings if isinstance(message, StageReport) else [message.timing]
        self._timings += [one for one in timings if one is not None and one.step_id in self._loads]

    def _measurements(self) -> Measurements:
        firsts = _first_steps(self._loads)
        measured = Measurements([[] for _ in range(self._scheduler.config.num_stages)])
        for timing in self._timings:
            if timing.step_id not in firsts:
                sample = Sample(self._loads[timing.step_id], timing.busy_s)
                measured.samples[timing.stage_index].append(sample)
        measured.trips = [
            (self._loads[step_id], trip_s)
            for step_id, trip_s in self._trips.items()
            if step_id not in firsts
        ]
        return measured


def _first_steps(loads: dict[int, StepLoad]) -> set[int]:
    """Of each number of tokens, the first step that had as many, if there are others."""
    firsts: dict[tuple[int, int], int] = {}
    repeated = set()
    for step_id, load in loads.items():
        kind = (load.num_prefill_tokens, load.num_decodes)
        if kind in firsts:
            repeated.add(firsts[kind])
        else:
            firsts[kind] = step_id
    return repeated
