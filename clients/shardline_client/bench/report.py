"""The figures of a measurement as tables, and as JSON."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shardline_client.bench.capacity import Capacity
from shardline_client.bench.classes import RequestClass
from shardline_client.bench.judgement import is_met
from shardline_client.bench.measure import Measurement, Point
from shardline_client.bench.records import Record
from shardline_client.bench.summary import Attainment, Distribution, Summary

LATENCIES = (
    ("TTFT", "ttft_ms", "time to first token"),
    ("TPOT", "tpot_ms", "mean per output token after it"),
    ("ITL", "itl_ms", "between two pieces"),
    ("E2E", "e2e_ms", "to the last token"),
    ("refusal", "refusal_ms", "until a refusal came"),
)
BUSY_SHARE = 0.5
LATE_MS = 20.0


def print_report(console: Console, measurement: Measurement) -> None:
    """Each point's figures, a row for each of several, and of a search no more than that."""
    points = measurement.points
    for point in points if not measurement.capacities else ():
        if len(points) > 1:
            console.print(f"\n[bold]{point.rate:.3g} requests/s")
        _print_point(console, point)
    if len(points) > 1:
        console.print(_overview(points))
    _print_troubles(console, points)
    for capacity in measurement.capacities:
        console.print(_capacity_line(capacity))


def write_json(path: Path, *, server: dict[str, Any], measurement: Measurement) -> None:
    """Everything: how it was measured, the figures, and each request on a line of its own."""
    head = {
        "server": server,
        "capacities": [asdict(capacity) for capacity in measurement.capacities],
        "points": [_point_figures(point) for point in measurement.points],
    }
    with path.open("w") as file:
        file.write(json.dumps(head, indent=1, default=str)[:-2] + ',\n "requests": [')
        separator = "\n  "
        for line in _request_lines(measurement):
            file.write(separator + line)
            separator = ",\n  "
        file.write("\n ]\n}\n")


def _print_point(console: Console, point: Point) -> None:
    summary = point.summary
    console.print(_counts(summary))
    console.print(
        f"{summary.requests_per_s:.2f} requests/s, "
        f"{summary.output_tokens_per_s:.1f} output tokens/s, "
        f"{summary.total_tokens_per_s:.1f} tokens/s with prompts"
    )
    if summary.num_cached_tokens:
        console.print(
            f"{summary.num_cached_tokens} of {summary.num_prompt_tokens} prompt tokens came from a "
            "cache; another --seed sends new prompts"
        )
    if (latencies := _latencies(summary)).row_count:
        console.print(latencies)
    if point.options.budgets:
        console.print(_budgets(point))
        if len(point.runs) > 1:
            console.print(_spread(point))
        if summary.budget.num_told:
            agreed = f"{summary.budget.num_agreed} of {summary.budget.num_told}"
            console.print(f"The server says the same of {agreed} budgets that it answered under.")
    if (retry := summary.retry_after_ms) is not None:
        console.print(
            f"{summary.num_retry_after} of {summary.num_refused} refusals said when to come back: "
            f"after {retry.p50 / 1000:.1f} s (p50), {retry.p99 / 1000:.1f} s (p99)"
        )


def _print_troubles(console: Console, points: list[Point]) -> None:
    """Each kind of error with how often it came, and what makes the figures doubtful."""
    records = (record for point in points for record in point.records)
    errors = Counter(record.error for record in records if record.error is not None)
    for error, count in errors.most_common():
        console.print(f"{count} x {error}", markup=False)
    for point in points:
        for warning in _warnings(point):
            at = "" if point.rate is None else f"{point.rate:.3g}/s: "
            console.print(f"[yellow]{at}{warning}")


def _counts(summary: Summary) -> str:
    expired = f"{summary.num_expired} expired, " if summary.num_expired else ""
    return (
        f"{summary.num_ok} ok, {summary.num_refused} refused, {expired}{summary.num_failed} failed "
        f"in {summary.duration_s:.2f} s"
    )


def _latencies(summary: Summary) -> Table:
    table = _right_aligned("ms", "mean", "p50", "p90", "p99")
    table.add_column("")
    for name, field, meaning in LATENCIES:
        values: Distribution | None = getattr(summary, field)
        if values is not None:
            cells = (f"{cell:.1f}" for cell in (values.mean, values.p50, values.p90, values.p99))
            table.add_row(name, *cells, f"[dim]{meaning}")
    return table


def _budgets(point: Point) -> Table:
    table = _right_aligned(
        "budget", "offered", "refused", "met", "admitted met", "each token", "goodput/s"
    )
    summary = point.summary
    for name, one in summary.budget_by_class.items():
        table.add_row(name, *_attainment_cells(one))
    if len(summary.budget_by_class) > 1:
        table.add_row("all", *_attainment_cells(summary.budget))
    return table


def _spread(point: Point) -> str:
    """Of the runs, one for each seed."""
    shares = [run.summary.budget.attainment for run in point.runs]
    goodputs = [run.summary.budget.goodput_per_s for run in point.runs]
    return (
        f"{len(shares)} seeds: {min(shares):.1%} to {max(shares):.1%} met, "
        f"goodput {min(goodputs):.2f} to {max(goodputs):.2f}/s"
    )


def _attainment_cells(one: Attainment) -> tuple[str, ...]:
    return (
        str(one.num_offered),
        str(one.num_refused),
        f"{one.attainment:.1%}",
        f"{one.admitted_attainment:.1%}",
        f"{one.schedule_attainment:.1%}",
        f"{one.goodput_per_s:.2f}",
    )


def _overview(points: list[Point]) -> Table:
    table = _right_aligned(
        "rate", "offered", "goodput", "met", "admitted", "refused", "TTFT p90", "TPOT p90"
    )
    for point in points:
        summary, budget = point.summary, point.summary.budget
        table.add_row(
            "-" if point.rate is None else f"{point.rate:.3g}",
            f"{summary.offered_per_s:.2f}",
            f"{budget.goodput_per_s:.2f}",
            f"{budget.attainment:.1%}",
            f"{budget.admitted_attainment:.1%}",
            str(budget.num_refused),
            *(f"{one.p90:.1f}" if one else "-" for one in (summary.ttft_ms, summary.tpot_ms)),
        )
    return table


def _capacity_line(capacity: Capacity) -> str:
    missed = "" if capacity.above is None else f", not at {capacity.above:.3g}/s"
    found = f"{capacity.rate:.3g} requests/s" if capacity.rate else "below all that was tried"
    return f"capacity at {capacity.target:.0%} in time: {found}{missed}"


def _warnings(point: Point) -> Iterator[str]:
    cpu_share = max(run.cpu_share for run in point.runs)
    lag = point.summary.send_lag_ms
    if cpu_share > BUSY_SHARE:
        yield f"the load generator itself took {cpu_share:.0%} of a core; it may be the limit"
    if lag is not None and lag.p99 > LATE_MS:
        yield f"requests were sent late (p99 {lag.p99:.0f} ms); latencies count from when due"


def _point_figures(point: Point) -> dict[str, Any]:
    runs = [
        {"seed": run.seed, "cpu_share": run.cpu_share, "summary": run.summary.as_dict()}
        for run in point.runs
    ]
    return {"rate": point.rate, "summary": point.summary.as_dict(), "runs": runs}


def _request_lines(measurement: Measurement) -> Iterator[str]:
    for point in measurement.points:
        wanted = {one.name: one for one in point.options.classes}
        for run in point.runs:
            for record in run.records:
                fields = _request_fields(record, wanted[record.class_name])
                yield json.dumps({"rate": point.rate, "seed": run.seed} | fields)


def _request_fields(record: Record, wanted: RequestClass) -> dict[str, Any]:
    return {
        "class": record.class_name,
        "outcome": record.outcome,
        "met": is_met(record, wanted),
        "start_s": round(record.start_s, 6),
        "sent_s": round(record.sent_s, 6),
        "end_s": round(record.end_s, 6),
        "token_times_s": [round(moment, 6) for moment in record.token_times_s],
        "token_counts": list(record.token_counts),
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_cached_tokens": record.num_cached_tokens,
        "num_output_tokens": record.num_output_tokens,
        "error": record.error,
        "retry_after_s": record.retry_after_s,
        "is_told_met": record.is_told_met,
        "predicted_ttft_ms": record.predicted_ttft_ms,
        "told_ttft_ms": record.told_ttft_ms,
    }


def _right_aligned(first: str, *others: str) -> Table:
    table = Table(first)
    for name in others:
        table.add_column(f"[bold]{name}", justify="right")
    return table
