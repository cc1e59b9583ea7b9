"""The figures of a run as a table, and as JSON."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shardline_client.bench.records import Distribution, Outcome, Record, Summary

LATENCIES = (
    ("TTFT", "ttft_ms", "time to first token"),
    ("TPOT", "tpot_ms", "mean per output token after it"),
    ("ITL", "itl_ms", "between two pieces"),
    ("E2E", "e2e_ms", "to the last token"),
)


def print_report(console: Console, summary: Summary, records: Sequence[Record]) -> None:
    """Counts, throughput and latencies; then each kind of error with how often it came."""
    console.print(
        f"{summary.num_ok} ok, {summary.num_refused} refused, {summary.num_failed} failed "
        f"in {summary.duration_s:.2f} s"
    )
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
    if summary.num_ok:
        console.print(_latencies(summary))
    errors = Counter(record.error for record in records if record.outcome is not Outcome.OK)
    for error, count in errors.most_common():
        console.print(f"{count} x {error}", markup=False)


def write_json(
    path: Path, *, server: dict[str, Any], summary: Summary, records: Sequence[Record]
) -> None:
    """Everything: how it was measured, the figures, and each request."""
    report = {
        "server": server,
        "summary": summary.as_dict(),
        "requests": [asdict(record) for record in records],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def _latencies(summary: Summary) -> Table:
    table = Table("ms", *(f"[bold]{name}" for name in ("mean", "p50", "p90", "p99")), "")
    for column in table.columns[1:5]:
        column.justify = "right"
    for name, field, meaning in LATENCIES:
        values: Distribution | None = getattr(summary, field)
        cells = (values.mean, values.p50, values.p90, values.p99) if values else ()
        shown = [f"{cell:.1f}" for cell in cells] or ["-"] * 4
        table.add_row(name, *shown, f"[dim]{meaning}")
    return table
