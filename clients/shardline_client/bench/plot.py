"""The chart of a measurement: how latencies are distributed, and what came of the load."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shardline_client.bench.measure import Measurement, Point
from shardline_client.bench.options import BenchOptions
from shardline_client.bench.records import Outcome, Record

MAX_CURVES = 6
Latencies = Callable[[Record], Iterable[float | None]]


def write_png(path: Path, measurement: Measurement, title: str) -> None:
    """TTFT and TPOT as cumulative shares; goodput against offered load, or in a closed loop ITL;
    output over time, at the highest rate.
    """
    points = measurement.points
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    (ttft, tpot), (third, throughput) = figure.subplots(2, 2)
    _draw_shares(ttft, "TTFT", points, lambda record: [record.ttft_s])
    _draw_shares(tpot, "TPOT", points, lambda record: [record.tpot_s])
    _draw_limits(ttft, points[0].options, "ttft_ms")
    _draw_limits(tpot, points[0].options, "tpot_ms")
    if points[0].options.is_open_loop:
        _draw_goodput(third, points)
    else:
        _draw_shares(third, "ITL", points, lambda record: record.itl_s)
    _draw_throughput(throughput, points[-1].runs[-1].records)
    figure.savefig(path, format="png", dpi=120)


def _draw_shares(axes: Axes, name: str, points: Sequence[Point], latencies: Latencies) -> None:
    axes.set(title=name, xlabel="ms", ylabel="share of all that ended well", ylim=(0, 1))
    axes.grid(alpha=0.3)
    step = -(-len(points) // MAX_CURVES)
    for point in points[::-step][::-1]:
        good = (record for record in point.records if record.outcome is Outcome.OK)
        values = [1000 * one for record in good for one in latencies(record) if one is not None]
        if values:
            axes.ecdf(values, label=None if point.rate is None else f"{point.rate:.3g}/s")
    if axes.lines:
        axes.set_xlim(left=0)
    if len(points) > 1 and axes.lines:
        axes.legend(fontsize="small", loc="lower right")


def _draw_limits(axes: Axes, options: BenchOptions, field: str) -> None:
    for wanted in options.classes:
        limit_ms = getattr(wanted, field)
        if limit_ms is not None:
            axes.axvline(limit_ms, color="grey", linestyle="--", linewidth=1)


def _draw_goodput(axes: Axes, points: Sequence[Point]) -> None:
    summaries = [point.summary for point in points]
    offered = [summary.offered_per_s for summary in summaries]
    axes.set(title="Goodput", xlabel="offered requests/s", ylabel="requests/s")
    axes.grid(alpha=0.3)
    axes.plot([0, max(offered)], [0, max(offered)], color="grey", linestyle=":", label="offered")
    completed = [summary.requests_per_s for summary in summaries]
    axes.plot(offered, completed, marker="o", label="ended well", alpha=0.6)
    if points[0].options.budgets:
        goodput = [summary.budget.goodput_per_s for summary in summaries]
        axes.plot(offered, goodput, marker="o", label="within the budget")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _draw_throughput(axes: Axes, records: Sequence[Record]) -> None:
    axes.set(title="Throughput", xlabel="s", ylabel="pieces with tokens per second")
    axes.grid(alpha=0.3)
    good = (record for record in records if record.outcome is Outcome.OK)
    counts = Counter(int(moment) for record in good for moment in record.token_times_s)
    if counts:
        seconds = range(max(counts) + 1)
        axes.step(seconds, [counts[second] for second in seconds], where="post")
        axes.set_ylim(bottom=0)
