"""The latency budget of a request, and how it went. All times are milliseconds from arrival."""

from enum import StrEnum

from msgspec import Struct


class Priority(StrEnum):
    """Which work comes first where budgets do not decide."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


class OnMiss(StrEnum):
    """What becomes of a request whose budget cannot be kept.

    REJECT makes the budget hard: refused at arrival, or ended as soon as it cannot be kept any
    more. DEGRADE makes it soft: admitted behind everything feasible, and never ended for it.
    """

    REJECT = "reject"
    DEGRADE = "degrade"


class LatencyBudget(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request asks for; None is no limit.

    `ttft_ms` is for the first token, `tpot_ms` for the mean time of each later one, `deadline_ms`
    for the last one.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    deadline_ms: float | None = None
    priority: Priority = Priority.STANDARD
    on_miss: OnMiss = OnMiss.REJECT

    @property
    def is_unlimited(self) -> bool:
        """Whether nothing is asked for."""
        return self.ttft_ms is None and self.tpot_ms is None and self.deadline_ms is None


class BudgetPrediction(Struct, frozen=True, kw_only=True):
    """What the scheduler expects of a request at its arrival; None where it has no estimate yet."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


class BudgetOutcome(Struct, frozen=True, kw_only=True):
    """How a finished request went, by the engine's clock, beside what was predicted at arrival.

    `met` is whether every limit of the budget was kept; True where nothing was asked for.
    `tpot_ms` is None below two output tokens.
    """

    met: bool
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float
    predicted: BudgetPrediction
