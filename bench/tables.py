"""Results for people: Markdown tables and charts."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def bars(path: Path, title: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """A chart for each group, a bar for each of its values."""
    shown = {name: values for name, values in groups.items() if values}
    figure = Figure(figsize=(4 * max(1, len(shown)), 4), layout="constrained")
    figure.suptitle(title)
    names = list(dict.fromkeys(name for values in shown.values() for name in values))
    for place, (group, values) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(1, len(shown), place, title=group)
        colors = [f"C{names.index(name)}" for name in values]
        drawn = axes.barh(list(values), list(values.values()), color=colors)
        axes.bar_label(drawn, fmt="%.0f", padding=2)
        axes.margins(x=0.15)
        axes.invert_yaxis()
        if place > 1:
            axes.set_yticks([])
    figure.savefig(path, dpi=120)
