"""The chart of a run: how latencies are distributed, and throughput over time."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shardline_client.bench.records import Outcome, Record


def write_png(path: Path, records: Sequence[Record], title: str) -> None:
    """TTFT, TPOT and ITL as cumulative shares; output tokens in each second of the run."""
    good = [record for record in records if record.outcome is Outcome.OK]
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    (ttft, tpot), (itl, throughput) = figure.subplots(2, 2)
    _draw_shares(ttft, "TTFT", [r.ttft_s for r in good if r.ttft_s is not None])
    _draw_shares(tpot, "TPOT", [r.tpot_s for r in good if r.tpot_s is not None])
    _draw_shares(itl, "ITL", [gap for r in good for gap in r.itl_s])
    _draw_throughput(throughput, good)
    figure.savefig(path, format="png", dpi=120)


def _draw_shares(axes: Axes, name: str, seconds: Sequence[float]) -> None:
    axes.set(title=name, xlabel="ms", ylabel="share of all", ylim=(0, 1))
    axes.grid(alpha=0.3)
    if seconds:
        axes.ecdf([1000 * value for value in seconds])
        axes.set_xlim(left=0)


def _draw_throughput(axes: Axes, good: Sequence[Record]) -> None:
    axes.set(title="Throughput", xlabel="s", ylabel="pieces with tokens per second")
    axes.grid(alpha=0.3)
    counts = Counter(int(moment) for record in good for moment in record.token_times_s)
    if counts:
        seconds = range(max(counts) + 1)
        axes.step(seconds, [counts[second] for second in seconds], where="post")
        axes.set_ylim(bottom=0)
