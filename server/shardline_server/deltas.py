"""What the scheduler says of a request, as the Deltas that front ends get."""

import msgspec

from shardline_scheduler import (
    BudgetImpossible,
    BudgetRefused,
    BudgetUnmet,
    DuplicateRequest,
    FinishReason,
    QueueFull,
    RequestOutput,
    RequestTooLong,
    SchedulerError,
    TenantQuotaExceeded,
)
from shardline_server.messages import Delta, Refusal

_ERROR_CODES: dict[type[SchedulerError], str] = {
    QueueFull: "QueueFull",
    RequestTooLong: "PromptTooLong",
    DuplicateRequest: "InvalidRequest",
    BudgetImpossible: "BudgetImpossible",
    BudgetUnmet: "BudgetUnmet",
    TenantQuotaExceeded: "TenantQuotaExceeded",
}


def delta_of(request_id: str, output: RequestOutput) -> Delta:
    """The news of a request."""
    return Delta(
        request_id,
        output.index,
        output.token_ids,
        output.logprobs,
        output.prompt_logprobs,
        output.finish_reason,
        None,
        None,
        output.num_cached_tokens,
        budget=output.budget,
    )


def refusal_of(request_id: str, error: SchedulerError) -> Delta:
    """That a request is not taken in, and why."""
    code, refusal = _ERROR_CODES[type(error)], None
    if isinstance(error, BudgetRefused):
        refusal = Refusal(
            retry_after_s=error.retry_after_s, asked=error.asked, predicted=error.predicted
        )
    return msgspec.structs.replace(failure_of(request_id, code, str(error)), refusal=refusal)


def failure_of(request_id: str, code: str, message: str, *, index: int = 0) -> Delta:
    """The last record of a request that ends with an error."""
    return Delta(request_id, index, [], [], [], FinishReason.ERROR, code, message, 0)
