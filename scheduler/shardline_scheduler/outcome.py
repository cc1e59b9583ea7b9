"""How a request went, beside what its latency budget asked for, and how all of them did."""

from msgspec import Struct
from msgspec.structs import replace

from .budget import BudgetOutcome, LatencyBudget, Priority
from .request import NEVER, Request


class ClassStats(Struct, frozen=True, array_like=True):
    """Totals of the requests of one class that asked for some limit. Who was refused is in none of
    the others. `predicted_ttft_s` and `ttft_error_s` sum what was predicted at arrival, and by how
    much it was off, over the `num_ttft` requests that had a prediction and got a token.
    """

    priority: Priority
    num_met: int
    num_missed: int
    num_refused: int
    num_ttft: int
    predicted_ttft_s: float
    ttft_error_s: float


class Outcomes:
    """Counts how requests went, by class."""

    def __init__(self) -> None:
        self._classes = {name: ClassStats(name, 0, 0, 0, 0, 0.0, 0.0) for name in Priority}
        self._newest: list[ClassStats] | None = None

    def by_class(self) -> list[ClassStats]:
        """One entry for each class."""
        if self._newest is None:
            self._newest = list(self._classes.values())
        return self._newest

    def count(self, budget: LatencyBudget, outcome: BudgetOutcome) -> None:
        """A request with this budget has ended."""
        if budget.is_unlimited:
            return
        stats, predicted_ms = self._classes[budget.priority], outcome.predicted.ttft_ms
        num_ttft, predicted_s, error_s = stats.num_ttft, stats.predicted_ttft_s, stats.ttft_error_s
        if predicted_ms is not None and outcome.ttft_ms is not None:
            num_ttft += 1
            predicted_s += predicted_ms / 1e3
            error_s += abs(outcome.ttft_ms - predicted_ms) / 1e3
        self._replace(
            ClassStats(
                stats.priority,
                stats.num_met + outcome.met,
                stats.num_missed + (not outcome.met),
                stats.num_refused,
                num_ttft,
                predicted_s,
                error_s,
            )
        )

    def count_refused(self, budget: LatencyBudget) -> None:
        """A request with this budget was not taken in."""
        stats = self._classes[budget.priority]
        self._replace(replace(stats, num_refused=stats.num_refused + 1))

    def _replace(self, stats: ClassStats) -> None:
        self._classes[stats.priority] = stats
        self._newest = None


def outcome_of(request: Request, now: float, *, is_complete: bool) -> BudgetOutcome:
    """The outcome of a request that ends `now`; one that is cut short has met nothing."""
    budget, arrival = request.budget, request.arrival_time
    ttft_ms = None
    if request.first_token_time != NEVER:
        ttft_ms = (request.first_token_time - arrival) * 1e3
    tpot_ms = None
    if request.num_output_tokens > 1:
        span = request.last_token_time - request.first_token_time
        tpot_ms = span / (request.num_output_tokens - 1) * 1e3
    e2e_ms = (now - arrival) * 1e3
    limits = (
        (budget.ttft_ms, ttft_ms),
        (budget.tpot_ms, tpot_ms),
        (budget.deadline_ms, e2e_ms),
    )
    return BudgetOutcome(
        met=is_complete and all(_keeps(limit, value) for limit, value in limits),
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        e2e_ms=e2e_ms,
        predicted=request.prediction,
    )


def _keeps(limit: float | None, value: float | None) -> bool:
    return limit is None or value is None or value <= limit
