"""Why a request is not taken in.

SchedulerError
├── DuplicateRequest     the id belongs to a request that is still alive
├── QueueFull            too many requests wait already; come back later
├── RequestTooLong       it could never finish, not even alone
├── BudgetImpossible     its latency budget could not be kept by an empty server either
├── BudgetUnmet          its latency budget cannot be kept beside what runs and waits; retry later
└── TenantQuotaExceeded  it could, but for the shares of other tenants; retry later
"""

from .budget import BudgetPrediction, LatencyBudget


class SchedulerError(Exception):
    """Base of everything that `Scheduler.add` raises on purpose; nothing was taken in."""


class DuplicateRequest(SchedulerError):
    """A live request has this id already."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request id {request_id!r} is in use; ids must be unique while alive")
        self.request_id = request_id


class QueueFull(SchedulerError):
    """The waiting queue is at its limit."""

    def __init__(self, num_waiting: int, max_num_waiting: int) -> None:
        super().__init__(
            f"{num_waiting} requests are waiting and the limit is {max_num_waiting}; retry later"
        )
        self.num_waiting = num_waiting
        self.max_num_waiting = max_num_waiting


class RequestTooLong(SchedulerError):
    """Prompt and output together exceed `max_num_tokens`: the context window or all KV memory."""

    def __init__(self, num_prompt_tokens: int, max_tokens: int, max_num_tokens: int) -> None:
        super().__init__(
            f"{num_prompt_tokens} prompt tokens and max_tokens {max_tokens} make "
            f"{num_prompt_tokens + max_tokens} tokens, and at most {max_num_tokens} fit; "
            "shorten the prompt or lower max_tokens"
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.max_num_tokens = max_num_tokens


class BudgetRefused(SchedulerError):
    """Base of refusals by prediction: what was asked for and what is predicted, in ms."""

    retry_after_s: float | None = None

    def __init__(self, message: str, asked: LatencyBudget, predicted: BudgetPrediction) -> None:
        super().__init__(f"{message}: {_compare(asked, predicted)}")
        self.asked = asked
        self.predicted = predicted


class BudgetImpossible(BudgetRefused):
    """The budget is below what an empty server needs."""

    def __init__(self, asked: LatencyBudget, predicted: BudgetPrediction) -> None:
        super().__init__("the latency budget is below what an empty server needs", asked, predicted)


class BudgetUnmet(BudgetRefused):
    """The budget cannot be kept now; after `retry_after_s` it could, if the load stays as it is.

    `reason` says what is short: predictions alone would look as if there were room.
    """

    def __init__(
        self,
        asked: LatencyBudget,
        predicted: BudgetPrediction,
        retry_after_s: float,
        reason: str,
    ) -> None:
        super().__init__(f"the latency budget cannot be kept now ({reason})", asked, predicted)
        self.retry_after_s = retry_after_s


class TenantQuotaExceeded(BudgetRefused):
    """The tenant has its share of a busy server; after `retry_after_s` there could be room."""

    def __init__(
        self,
        tenant: str,
        asked: LatencyBudget,
        predicted: BudgetPrediction,
        retry_after_s: float,
    ) -> None:
        message = f"tenant {tenant!r} has its share of a busy server already"
        super().__init__(message, asked, predicted)
        self.tenant = tenant
        self.retry_after_s = retry_after_s


def _compare(asked: LatencyBudget, predicted: BudgetPrediction) -> str:
    pairs = (
        ("ttft_ms", asked.ttft_ms, predicted.ttft_ms),
        ("tpot_ms", asked.tpot_ms, predicted.tpot_ms),
        ("deadline_ms", asked.deadline_ms, predicted.e2e_ms),
    )
    return ", ".join(
        f"{name} {limit:.0f} asked and {'unknown' if value is None else f'{value:.0f}'} predicted"
        for name, limit, value in pairs
        if limit is not None
    )
