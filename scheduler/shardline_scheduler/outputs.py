"""What the scheduler tells the engine: news of requests, and gauges."""

from collections.abc import Sequence
from typing import Self

from msgspec import Struct

from .accuracy import Accuracy
from .budget import BudgetOutcome
from .outcome import ClassStats
from .plan import TokenLogprobs
from .request import FinishReason, Request


class RequestOutput(Struct, frozen=True, gc=False):
    """News of one request: `token_ids` are its output tokens `index`, `index + 1`, …

    `logprobs` has one entry a token, or is empty. `prompt_logprobs` comes in pieces, in order,
    beginning with prompt token 1 and complete with the first output token. Whoever has a
    `finish_reason` is gone from the scheduler, and `budget` says how it went. `num_cached_tokens`
    counts the prompt tokens that came from the prefix cache.
    """

    request_id: str
    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    prompt_logprobs: Sequence[TokenLogprobs]
    finish_reason: FinishReason | None
    num_cached_tokens: int
    budget: BudgetOutcome | None = None

    @classmethod
    def of(
        cls,
        request: Request,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        prompt_logprobs: Sequence[TokenLogprobs],
        finish_reason: FinishReason | None,
        budget: BudgetOutcome | None = None,
    ) -> Self:
        """The news of `request`, which holds `token_ids` as its last tokens already."""
        return cls(
            request_id=request.request_id,
            index=request.num_output_tokens - len(token_ids),
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            num_cached_tokens=request.num_cached_tokens,
            budget=budget,
        )


class SchedulerStats(Struct, frozen=True, kw_only=True):
    """Gauges of this moment, and totals since the start.

    free + cached + used blocks make `num_kv_blocks`; a cached block is used by nobody and can be
    allocated. Prefix queries and hits count prompt tokens, each request once. `classes` say how
    budgets were kept, `accuracy` how well the times of steps are predicted.
    """

    num_running: int
    num_waiting: int
    num_kv_blocks: int
    num_used_kv_blocks: int
    num_cached_kv_blocks: int
    num_preemptions: int
    num_prefix_queries: int
    num_prefix_hits: int
    num_steps: int
    num_in_flight: int
    classes: list[ClassStats]
    accuracy: Accuracy
