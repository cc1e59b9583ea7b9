"""Whether a request kept its latency budget: as a whole, and token by token."""

from math import ceil, inf

from shardline_client.bench.classes import RequestClass
from shardline_client.bench.records import Outcome, Record


def is_met(record: Record, wanted: RequestClass) -> bool:
    """It ended well, and TTFT, mean TPOT and the time to the last token are within the limits."""
    if record.outcome is not Outcome.OK:
        return False
    measured = (
        (record.ttft_s, wanted.ttft_ms),
        (record.tpot_s, wanted.tpot_ms),
        (record.e2e_s, wanted.deadline_ms),
    )
    return all(
        seconds is None or limit_ms is None or 1000 * seconds <= limit_ms
        for seconds, limit_ms in measured
    )


def num_late_tokens(record: Record, wanted: RequestClass) -> int:
    """Output tokens after their own deadlines: token k is due at TTFT + (k - 1) TPOT, k from 1.

    Without a TTFT limit the first token's own time takes its place; none is due after
    `deadline_ms`. A mean TPOT hides stalls, this does not. Where a server tells fewer pieces than
    tokens and not which, they are spread evenly.
    """
    if not record.token_times_s:
        return 0
    first_due_s = _seconds(wanted.ttft_ms)
    if first_due_s == inf and wanted.tpot_ms is not None:
        first_due_s = record.token_times_s[0] - record.start_s
    gap_s, last_due_s = _seconds(wanted.tpot_ms), _seconds(wanted.deadline_ms)
    scale = max(1.0, record.num_output_tokens / sum(record.token_counts))
    num_late, num_before = 0, 0.0
    for moment_s, count in zip(record.token_times_s, record.token_counts, strict=True):
        num_after = num_before + count * scale
        late_s = moment_s - record.start_s - first_due_s
        if moment_s - record.start_s > last_due_s:
            num_late += round(num_after) - round(num_before)
        elif late_s > 0:
            # Those of the piece whose place k - 1 is below late_s / gap_s.
            num_due = 1 if gap_s == inf else ceil(late_s / gap_s)
            num_late += max(0, min(round(num_after), num_due) - round(num_before))
        num_before = num_after
    return num_late


def _seconds(limit_ms: float | None) -> float:
    return inf if limit_ms is None else limit_ms / 1000
