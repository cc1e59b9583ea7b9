"""The figures that follow from the records of a run."""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, quantiles
from typing import Any

from shardline_client.bench.classes import RequestClass
from shardline_client.bench.judgement import is_met, num_late_tokens
from shardline_client.bench.records import Outcome, Record

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """In milliseconds, by linear interpolation between the values."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Distribution | None":
        """None of nothing."""
        values = array("d", (1000 * value for value in seconds))
        if not values:
            return None
        cuts = quantiles(values * 2 if len(values) == 1 else values, n=100, method="inclusive")
        p50, p90, p99 = (cuts[percent - 1] for percent in PERCENTILES)
        return cls(mean=fmean(values), p50=p50, p90=p90, p99=p99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attainment:
    """How budgets were kept; whatever was offered counts, and a refusal is no success.

    `num_on_schedule` are those that ended well with every single token in time; of `num_told` the
    server said itself whether it had kept the budget, and `num_agreed` times the same as we.
    """

    num_offered: int
    num_refused: int
    num_met: int
    num_on_schedule: int
    num_tokens: int
    num_late_tokens: int
    num_told: int
    num_agreed: int
    duration_s: float

    @property
    def attainment(self) -> float:
        """Share of all offered requests that kept their whole budget."""
        return _share(self.num_met, self.num_offered)

    @property
    def admitted_attainment(self) -> float:
        """The same of those that were not refused."""
        return _share(self.num_met, self.num_offered - self.num_refused)

    @property
    def schedule_attainment(self) -> float:
        """Share of all offered requests with every token in time."""
        return _share(self.num_on_schedule, self.num_offered)

    @property
    def goodput_per_s(self) -> float:
        """Requests per second that kept their whole budget."""
        return _share(self.num_met, self.duration_s)

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        names = ("attainment", "admitted_attainment", "schedule_attainment", "goodput_per_s")
        return asdict(self) | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The figures of one load; latencies and throughput count only requests that ended well.

    `refusal_ms` is how long a refusal took from when it was sent, `send_lag_ms` how late this
    program sent.
    """

    num_ok: int
    num_refused: int
    num_expired: int
    num_failed: int
    duration_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_retry_after: int
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None
    refusal_ms: Distribution | None
    retry_after_ms: Distribution | None
    send_lag_ms: Distribution | None
    budget: Attainment
    budget_by_class: Mapping[str, Attainment]

    @property
    def num_offered(self) -> int:
        """However they ended."""
        return self.num_ok + self.num_refused + self.num_expired + self.num_failed

    @property
    def offered_per_s(self) -> float:
        """Requests that arrived."""
        return _share(self.num_offered, self.duration_s)

    @property
    def requests_per_s(self) -> float:
        """Ended well."""
        return _share(self.num_ok, self.duration_s)

    @property
    def output_tokens_per_s(self) -> float:
        """Of requests that ended well."""
        return _share(self.num_output_tokens, self.duration_s)

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and output."""
        return _share(self.num_prompt_tokens + self.num_output_tokens, self.duration_s)

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        rates = ("offered_per_s", "requests_per_s", "output_tokens_per_s", "total_tokens_per_s")
        by_class = {name: one.as_dict() for name, one in self.budget_by_class.items()}
        return (
            asdict(self)
            | {name: getattr(self, name) for name in rates}
            | {"budget": self.budget.as_dict(), "budget_by_class": by_class}
        )


def summarize(
    records: Sequence[Record], duration_s: float, classes: Sequence[RequestClass]
) -> Summary:
    """Of records that arrived within `duration_s`."""
    good = [record for record in records if record.outcome is Outcome.OK]
    refused = [record for record in records if record.outcome is Outcome.REFUSED]
    outcomes = [record.outcome for record in records]
    waits_s = [r.retry_after_s for r in refused if r.retry_after_s is not None]
    return Summary(
        num_ok=len(good),
        num_refused=len(refused),
        num_expired=outcomes.count(Outcome.EXPIRED),
        num_failed=outcomes.count(Outcome.FAILED),
        duration_s=duration_s,
        num_prompt_tokens=sum(record.num_prompt_tokens for record in good),
        num_cached_tokens=sum(record.num_cached_tokens for record in good),
        num_output_tokens=sum(record.num_output_tokens for record in good),
        num_retry_after=len(waits_s),
        ttft_ms=Distribution.of(_known(record.ttft_s for record in good)),
        tpot_ms=Distribution.of(_known(record.tpot_s for record in good)),
        itl_ms=Distribution.of(gap for record in good for gap in record.itl_s),
        e2e_ms=Distribution.of(_known(record.e2e_s for record in good)),
        refusal_ms=Distribution.of(record.end_s - record.sent_s for record in refused),
        retry_after_ms=Distribution.of(waits_s),
        send_lag_ms=Distribution.of(record.sent_s - record.start_s for record in records),
        budget=_attainment(records, duration_s, classes),
        budget_by_class={
            one.name: _attainment(
                [r for r in records if r.class_name == one.name], duration_s, [one]
            )
            for one in classes
        },
    )


def _attainment(
    records: Sequence[Record], duration_s: float, classes: Sequence[RequestClass]
) -> Attainment:
    wanted = {one.name: one for one in classes}
    judged = [(record, wanted[record.class_name]) for record in records]
    num_late = [num_late_tokens(record, one) for record, one in judged]
    are_ok = [record.outcome is Outcome.OK for record in records]
    are_met = [is_met(record, one) for record, one in judged]
    told = [record.is_told_met for record in records]
    return Attainment(
        num_offered=len(records),
        num_refused=sum(record.outcome is Outcome.REFUSED for record in records),
        num_met=sum(are_met),
        num_on_schedule=sum(
            is_ok and not late for is_ok, late in zip(are_ok, num_late, strict=True)
        ),
        num_tokens=sum(record.num_output_tokens for record in records),
        num_late_tokens=sum(num_late),
        num_told=sum(one is not None for one in told),
        num_agreed=sum(one is ours for one, ours in zip(told, are_met, strict=True)),
        duration_s=duration_s,
    )


def _known(values: Iterable[float | None]) -> Iterator[float]:
    return (value for value in values if value is not None)


def _share(amount: float, whole: float) -> float:
    return amount / whole if whole else 0.0
