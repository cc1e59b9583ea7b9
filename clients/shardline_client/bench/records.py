"""What happened to each request, and the figures that follow. Times are in seconds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import pairwise
from statistics import fmean, quantiles
from typing import Any

PERCENTILES = (50, 90, 99)


class Outcome(StrEnum):
    """How a request ended."""

    OK = "ok"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One request; times count from the first request of the run.

    `token_times_s` are the moments when pieces with tokens came. `num_output_tokens` is the
    server's count, or that of the pieces if it has none.
    """

    start_s: float
    end_s: float
    outcome: Outcome
    token_times_s: tuple[float, ...] = ()
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """To the first token."""
        return self.token_times_s[0] - self.start_s if self.token_times_s else None

    @property
    def e2e_s(self) -> float | None:
        """To the last token."""
        return self.token_times_s[-1] - self.start_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean per output token after the first: (E2E - TTFT) / (tokens - 1)."""
        if not self.token_times_s or self.num_output_tokens < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Between one piece with tokens and the next."""
        return [after - before for before, after in pairwise(self.token_times_s)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """In milliseconds, by linear interpolation between the values."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Distribution | None":
        """None of nothing."""
        if not seconds:
            return None
        values = [1000 * value for value in seconds]
        cuts = quantiles(values * 2 if len(values) == 1 else values, n=100, method="inclusive")
        p50, p90, p99 = (cuts[percent - 1] for percent in PERCENTILES)
        return cls(mean=fmean(values), p50=p50, p90=p90, p99=p99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The figures of a run; latencies and throughput count only requests that ended well."""

    num_ok: int
    num_refused: int
    num_failed: int
    duration_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None

    @property
    def requests_per_s(self) -> float:
        """Ended well."""
        return self._per_s(self.num_ok)

    @property
    def output_tokens_per_s(self) -> float:
        """Of requests that ended well."""
        return self._per_s(self.num_output_tokens)

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and output."""
        return self._per_s(self.num_prompt_tokens + self.num_output_tokens)

    def _per_s(self, amount: int) -> float:
        return amount / self.duration_s if self.duration_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        rates = ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")
        return asdict(self) | {name: getattr(self, name) for name in rates}


def summarize(records: Sequence[Record]) -> Summary:
    """From the first request's start to the last one's end."""
    good = [record for record in records if record.outcome is Outcome.OK]
    outcomes = [record.outcome for record in records]
    return Summary(
        num_ok=len(good),
        num_refused=outcomes.count(Outcome.REFUSED),
        num_failed=outcomes.count(Outcome.FAILED),
        duration_s=max((record.end_s for record in records), default=0.0),
        num_prompt_tokens=sum(record.num_prompt_tokens for record in good),
        num_cached_tokens=sum(record.num_cached_tokens for record in good),
        num_output_tokens=sum(record.num_output_tokens for record in good),
        ttft_ms=Distribution.of([r.ttft_s for r in good if r.ttft_s is not None]),
        tpot_ms=Distribution.of([r.tpot_s for r in good if r.tpot_s is not None]),
        itl_ms=Distribution.of([gap for r in good for gap in r.itl_s]),
        e2e_ms=Distribution.of([r.e2e_s for r in good if r.e2e_s is not None]),
    )
