"""From a step's logits to what the engine is told of it: drawn tokens, and prompts' logprobs.

What was drawn is also kept, for a next step that was planned before the engine knew of it.
"""

import torch
from torch import Tensor

from shardline_scheduler.plan import PromptLogprobs, StepResult, TokenLogprobs
from shardline_shards.batch import PromptRows, RequestTable, StepBatch
from shardline_shards.sampling import prompt_logprobs, sample


def draw(step_id: int, batch: StepBatch, logits: Tensor, requests: RequestTable) -> StepResult:
    """The result of a step; `logits` [num_rows, vocab_size], in the order of `logit_indexes`."""
    num_drawn = len(batch.drawing)
    token_ids, logprobs = _draw_tokens(batch.drawing, logits[:num_drawn], requests)
    told, first_row = [], num_drawn
    for rows in batch.prompt_rows:
        own_logits = logits[first_row : first_row + rows.num_rows]
        told.append(_tell_prompt(rows, own_logits, requests))
        first_row += rows.num_rows
    return StepResult(step_id, token_ids, logprobs, told)


def _draw_tokens(
    request_indexes: list[int], logits: Tensor, requests: RequestTable
) -> tuple[list[int], dict[int, TokenLogprobs]]:
    """A token from each row of `logits`, for these requests; and logprobs by request index."""
    states = [requests[index] for index in request_indexes]
    token_ids, logprobs = sample(logits, states)
    for state, token_id in zip(states, token_ids, strict=True):
        state.last_drawn = token_id
    return token_ids, {request_indexes[row]: own for row, own in logprobs.items()}


def _tell_prompt(rows: PromptRows, logits: Tensor, requests: RequestTable) -> PromptLogprobs:
    request, start = requests[rows.request_index], rows.start + 1
    targets = torch.tensor(request.token_ids[start : start + rows.num_rows])
    top = request.sampling.num_prompt_logprobs or 0
    return PromptLogprobs(rows.request_index, start, prompt_logprobs(logits, targets, top))
