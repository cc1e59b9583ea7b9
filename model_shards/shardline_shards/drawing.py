"""From a step's logits to what the engine is told of it: drawn tokens, and prompts' logprobs.

What was drawn is also kept, for a next step that was planned before the engine knew of it.
"""

import torch
from torch import Tensor

from shardline_scheduler.plan import PromptLogprobs, SampledToken
from shardline_shards.batch import RequestTable, StepBatch
from shardline_shards.sampling import SampleRow, prompt_logprobs, sample


def draw_tokens(batch: StepBatch, logits: Tensor, requests: RequestTable) -> list[SampledToken]:
    """A token for each of the rows that samples; `logits` [num_rows, vocab_size]."""
    drawn = [(index, row) for index, row in enumerate(batch.rows) if row.samples]
    if not drawn:
        return []
    if len(drawn) < len(batch.rows):
        logits = logits[[index for index, _ in drawn]]
    indexes = [row.request_index for _, row in drawn]
    states = [requests[index] for index in indexes]
    tokens = sample(
        logits, [SampleRow(s.sampling, s.token_ids, s.num_prompt_tokens) for s in states]
    )
    for state, (token_id, _) in zip(states, tokens, strict=True):
        state.last_drawn = token_id
    return [
        SampledToken(index, token_id, logprobs)
        for index, (token_id, logprobs) in zip(indexes, tokens, strict=True)
    ]


def draw_prompt_logprobs(
    batch: StepBatch, logits: Tensor, requests: RequestTable
) -> list[PromptLogprobs]:
    """Of the prompt tokens that this step's rows predict, for each request that asked."""
    by_request: dict[int, list[int]] = {}
    for index, row in enumerate(batch.rows):
        if not row.samples:
            by_request.setdefault(row.request_index, []).append(index)
    return [
        _prompt_part(batch, logits, requests, request_index, indexes)
        for request_index, indexes in by_request.items()
    ]


def _prompt_part(
    batch: StepBatch, logits: Tensor, requests: RequestTable, request_index: int, indexes: list[int]
) -> PromptLogprobs:
    request = requests[request_index]
    start = batch.rows[indexes[0]].position + 1
    targets = torch.tensor(request.token_ids[start : start + len(indexes)])
    top = request.sampling.num_prompt_logprobs or 0
    return PromptLogprobs(request_index, start, prompt_logprobs(logits[indexes], targets, top))
