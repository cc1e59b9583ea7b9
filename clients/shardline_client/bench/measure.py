"""Runs the load at each rate with each seed, and keeps what counts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from shardline_client.bench.arrivals import Trace
from shardline_client.bench.capacity import Capacity, find_capacities
from shardline_client.bench.load import Load, Observer, plan
from shardline_client.bench.options import BenchOptions
from shardline_client.bench.prompts import Prompts
from shardline_client.bench.records import Record
from shardline_client.bench.summary import Summary, summarize

FIRST_RATE = 1.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One seed at one rate; `records` are those that count, of `duration_s` of arrivals.

    `cpu_share` is what the load generator itself took of one core.
    """

    seed: int
    options: BenchOptions
    records: list[Record]
    duration_s: float
    cpu_share: float

    @cached_property
    def summary(self) -> Summary:
        """The figures of this run alone."""
        return summarize(self.records, self.duration_s, self.options.classes)


@dataclass(frozen=True, kw_only=True)
class Point:
    """All runs at one rate; None in a closed loop, and of a trace as it was recorded."""

    rate: float | None
    runs: list[Run]

    @property
    def options(self) -> BenchOptions:
        """The same for all runs."""
        return self.runs[0].options

    @property
    def records(self) -> list[Record]:
        """Of all runs."""
        return [record for run in self.runs for record in run.records]

    @cached_property
    def summary(self) -> Summary:
        """Of all runs together."""
        duration_s = sum(run.duration_s for run in self.runs)
        return summarize(self.records, duration_s, self.options.classes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Every point, in the order of their rates."""

    points: list[Point]
    capacities: list[Capacity]


class Bench:
    """One server, and the load it is to have. `begin` is told of each run, for a progress bar."""

    def __init__(
        self,
        load: Load,
        options: BenchOptions,
        prompts: Prompts,
        trace: Trace | None,
        *,
        begin: Callable[[str], Observer],
    ) -> None:
        self._load = load
        self._options = options
        self._prompts = prompts
        self._trace = trace
        self._begin = begin
        self._points: list[Point] = []

    async def measure(self) -> Measurement:
        """Raises ValueError where nothing is left between warm-up and cool-down."""
        options = self._options
        rates = options.rates or (None,)
        warm_up = plan(options, self._prompts, f"warm-up {options.seed}")
        await self._load.warm_up(next(warm_up))  # no prefix that the runs will use
        capacities = []
        if options.find_capacity:
            first = rates[0] or (self._trace.rate if self._trace else FIRST_RATE)
            capacities = await find_capacities(self._attainment, first, options.precision)
        else:
            for rate in rates:
                await self._measure_at(rate)
        points = sorted(self._points, key=lambda point: point.rate or 0.0)
        return Measurement(points=points, capacities=capacities)

    async def _attainment(self, rate: float) -> float:
        return (await self._measure_at(rate)).summary.budget.attainment

    async def _measure_at(self, rate: float | None) -> Point:
        runs = [await self._run(rate, seed) for seed in self._options.seeds]
        self._points.append(Point(rate=rate, runs=runs))
        return self._points[-1]

    async def _run(self, rate: float | None, seed: int) -> Run:
        options = self._options
        requests = plan(options, self._prompts, seed, rate=rate, trace=self._trace)
        speed = "" if rate is None else f"{rate:.3g}/s, "
        sent = await self._load.run(requests, self._begin(f"{speed}seed {seed}"))
        records = sent.records
        duration_s = max((record.end_s for record in records), default=0.0)
        if options.is_open_loop:
            first_s, last_s = options.warm_up_s, sent.span_s - options.cool_down_s
            records = [record for record in records if first_s <= record.start_s < last_s]
            duration_s = last_s - first_s
        if duration_s <= 0:
            raise ValueError(
                f"Arrivals ended after {sent.span_s:.1f} s, which --warm-up and --cool-down leave "
                "nothing of; ask for more requests."
            )
        return Run(
            seed=seed,
            options=options,
            records=records,
            duration_s=duration_s,
            cpu_share=sent.cpu_s / sent.wall_s,
        )
