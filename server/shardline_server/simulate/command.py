"""What `shardline simulate` does: a bench's load, on replicas that exist as numbers alone."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from shardline_client.bench.arrivals import Trace, read_trace
from shardline_client.bench.load import PlannedRequest, plan
from shardline_client.bench.measure import Measurement, Point, Run
from shardline_client.bench.options import BenchOptions
from shardline_client.bench.plot import write_png
from shardline_client.bench.prompts import TokenPrompts
from shardline_client.bench.records import Outcome, Record
from shardline_client.bench.report import print_report, write_json
from shardline_scheduler import (
    FinishReason,
    LatencyBudget,
    OnMiss,
    PipeModel,
    Priority,
    RequestTooLong,
    SchedulerConfig,
)
from shardline_server.errors import ConfigError
from shardline_server.simulate.cluster import ROUTERS, Cluster
from shardline_server.simulate.prices import knowing_spread, make_noise
from shardline_server.simulate.replica import Replica, Visit
from shardline_server.simulate.report import PipeSummary, print_pipes, summarize_pipes, write_pipes

LoadReader = Callable[[dict[str, Any]], BenchOptions]

_GOOD_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateOptions:
    """What is simulated, beside the load. `max_tokens` hides output lengths from the scheduler."""

    num_replicas: int
    router: str
    noise: float
    max_tokens: int | None
    scheduler: SchedulerConfig


def run(
    load: BenchOptions,
    options: SimulateOptions,
    model: PipeModel,
    json_file: Path | None,
    png_file: Path | None,
) -> None:
    """Simulate every rate, and report. Raises ConfigError where nothing arrives on its own."""
    if not load.is_open_loop:
        raise ConfigError("requests have to arrive on their own: give --rate or --trace")
    trace = None if load.trace is None else read_trace(load.trace)
    outcomes = [_simulate(load, options, model, rate, trace) for rate in load.rates or (None,)]
    measurement = Measurement(points=[point for point, _ in outcomes], capacities=[])
    pipes = [pipe for _, pipe in outcomes]
    console = Console()
    print_report(console, measurement)
    print_pipes(console, pipes)
    if json_file is not None:
        about = {"simulated": asdict(options), "load": asdict(load), "seed": load.seed}
        pipe_figures = [asdict(pipe) for pipe in pipes]
        write_json(json_file, server=about | {"pipes": pipe_figures}, measurement=measurement)
    if png_file is not None:
        write_png(png_file, measurement, _title(options))
        write_pipes(png_file.with_suffix(f".pipe{png_file.suffix}"), pipes, _title(options))


def _title(options: SimulateOptions) -> str:
    return f"{options.num_replicas} replicas of {options.scheduler.num_stages} stages, simulated"


def _simulate(
    load: BenchOptions,
    options: SimulateOptions,
    model: PipeModel,
    rate: float | None,
    trace: Trace | None,
) -> tuple[Point, PipeSummary]:
    known = knowing_spread(model, options.noise)
    replicas = [
        Replica(
            options.scheduler, model, make_noise(options.noise, (load.seed, number)), known=known
        )
        for number in range(options.num_replicas)
    ]
    cluster = Cluster(replicas, ROUTERS[options.router])
    planned = _Load(load, plan(load, TokenPrompts([0]), load.seed, rate=rate, trace=trace))
    visits: list[tuple[Visit, str]] = []
    cluster.run(_remember(planned, options, visits))
    first_s, last_s = load.warm_up_s, planned.span_s - load.cool_down_s
    records = [_record(visit, name) for visit, name in visits]
    counted = [record for record in records if first_s <= record.start_s < last_s]
    run_ = Run(
        seed=load.seed,
        options=load,
        records=counted,
        duration_s=last_s - first_s,
        cpu_share=0.0,
    )
    return Point(rate=rate, runs=[run_]), summarize_pipes(replicas, cluster.now)


class _Load:
    """The planned requests up to the end of the load; `span_s` is how long arrivals went on."""

    def __init__(self, options: BenchOptions, planned: Iterator[PlannedRequest]) -> None:
        self.span_s = 0.0
        self._options = options
        self._planned = planned

    def __iter__(self) -> Iterator[PlannedRequest]:
        options, number = self._options, 0
        for number, request in enumerate(self._planned):
            self.span_s = request.arrival_s
            if number == options.max_requests:
                return
            if options.duration_s is not None and request.arrival_s >= options.duration_s:
                self.span_s = options.duration_s
                return
            yield request
        self.span_s += self.span_s / max(1, number)  # A trace's end: one more mean gap.


def _remember(
    planned: _Load, options: SimulateOptions, visits: list[tuple[Visit, str]]
) -> Iterator[Visit]:
    for number, request in enumerate(planned):
        assert isinstance(request.prompt, list)
        visit = Visit(
            number=number,
            arrival_s=request.arrival_s,
            prompt=request.prompt,
            num_output_tokens=request.num_output_tokens,
            max_tokens=max(options.max_tokens or 0, request.num_output_tokens),
            budget=_budget(request),
        )
        visits.append((visit, request.wanted.name))
        yield visit


def _budget(request: PlannedRequest) -> LatencyBudget:
    wanted = request.wanted
    return LatencyBudget(
        ttft_ms=wanted.ttft_ms,
        tpot_ms=wanted.tpot_ms,
        deadline_ms=wanted.deadline_ms,
        priority=Priority(wanted.name),
        on_miss=OnMiss(wanted.on_miss),
    )


def _record(visit: Visit, class_name: str) -> Record:
    told = visit.outcome
    return Record(
        start_s=visit.arrival_s,
        sent_s=visit.arrival_s,
        end_s=visit.end_s,
        outcome=_outcome(visit),
        class_name=class_name,
        token_times_s=visit.token_times_s,
        token_counts=[1] * len(visit.token_times_s),
        num_prompt_tokens=len(visit.prompt),
        num_output_tokens=len(visit.token_times_s),
        error=None if visit.refusal is None else str(visit.refusal),
        retry_after_s=getattr(visit.refusal, "retry_after_s", None),
        is_told_met=told.met if told else None,
        predicted_ttft_ms=told.predicted.ttft_ms if told else None,
        told_ttft_ms=told.ttft_ms if told else None,
    )


def _outcome(visit: Visit) -> Outcome:
    if visit.refusal is not None:
        is_wrong = isinstance(visit.refusal, RequestTooLong)
        return Outcome.FAILED if is_wrong else Outcome.REFUSED
    return Outcome.OK if visit.finish_reason in _GOOD_ENDS else Outcome.EXPIRED
