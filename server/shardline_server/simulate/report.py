"""What became of the stages' time in a simulation: a table and a chart."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from shardline_server.engine_timeline import TimePart
from shardline_server.simulate.replica import Replica


@dataclass(frozen=True, kw_only=True, slots=True)
class PipeSummary:
    """Over all replicas: shares of the wall time by part, for each stage; the rest is means.

    `utilisation` is computing as a share of the time in which there was work.
    """

    wall_s: float
    num_steps: int
    num_preemptions: int
    utilisation: float
    batch_imbalance: float
    stage_imbalance: float
    stage_shares: list[dict[str, float]]


def summarize_pipes(replicas: Sequence[Replica], now: float) -> PipeSummary:
    """As of `now`, on their clock."""
    pipes = [replica.pipe.accounting.stats(now) for replica in replicas]
    wall_s = pipes[0].wall_s * len(pipes)
    shares = [
        {
            part: sum(pipe.stages[stage].seconds[part] for pipe in pipes) / wall_s
            for part in TimePart
        }
        for stage in range(replicas[0].num_stages)
    ]
    stats = [replica.scheduler.stats() for replica in replicas]
    busy = fmean(one[TimePart.COMPUTE] for one in shares)
    idle = fmean(one[TimePart.IDLE] for one in shares)
    return PipeSummary(
        wall_s=pipes[0].wall_s,
        num_steps=sum(one.num_steps for one in stats),
        num_preemptions=sum(one.num_preemptions for one in stats),
        utilisation=busy / (1 - idle) if idle < 1 else 0.0,
        batch_imbalance=fmean(pipe.batch_imbalance for pipe in pipes),
        stage_imbalance=fmean(pipe.stage_imbalance for pipe in pipes),
        stage_shares=[{part.value: share for part, share in one.items()} for one in shares],
    )


def print_pipes(console: Console, summaries: Sequence[PipeSummary]) -> None:
    """One table for each rate."""
    for summary in summaries:
        console.print(_table(summary))
        console.print(
            f"{summary.num_steps} steps in {summary.wall_s:.1f} s, {summary.num_preemptions} "
            f"preemptions; utilisation {summary.utilisation:.1%} while there was work; uneven "
            f"micro-batches {summary.batch_imbalance:.1%}, stages {summary.stage_imbalance:.1%}"
        )


def _table(summary: PipeSummary) -> Table:
    table = Table("stage", title="where the stages' time went")
    for part in TimePart:
        table.add_column(part.value, justify="right")
    for stage, shares in enumerate(summary.stage_shares):
        table.add_row(str(stage), *(f"{shares[part]:.1%}" for part in TimePart))
    return table


def write_pipes(path: Path, summaries: Sequence[PipeSummary], title: str) -> None:
    """Stages side by side, each time's parts on top of one another; one chart for each rate."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3.5 * len(summaries)), layout="constrained")
    figure.suptitle(title)
    for axes, summary in zip(
        figure.subplots(len(summaries), 1, squeeze=False)[:, 0], summaries, strict=True
    ):
        stages = range(len(summary.stage_shares))
        bottom = [0.0] * len(stages)
        for part in TimePart:
            heights = [shares[part] for shares in summary.stage_shares]
            axes.bar(stages, heights, bottom=bottom, label=part.value)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="stage", ylabel="share of the wall time", ylim=(0, 1))
        axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, format="png", dpi=120)
