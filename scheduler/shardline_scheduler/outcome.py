"""How a request went, beside what its latency budget asked for."""

from .budget import BudgetOutcome
from .request import NEVER, Request


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
