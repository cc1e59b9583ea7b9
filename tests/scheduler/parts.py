"""A plan by requests: its decodes and its chunks in one form."""

from collections.abc import Sequence
from dataclasses import dataclass

from shardline_scheduler.plan import StepPlan


@dataclass(frozen=True)
class Part:
    """What a step does for one request: tokens [num_computed, num_computed + num_scheduled)."""

    request_index: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    token_ids: Sequence[int]
    block_ids: Sequence[int]
    samples: bool

    @property
    def end(self) -> int:
        return self.num_computed_tokens + self.num_scheduled_tokens


def parts_of(plan: StepPlan) -> list[Part]:
    """In the order in which their tokens are computed."""
    decodes = plan.decodes
    columns = (decodes.request_indexes, decodes.num_computed_tokens, decodes.token_ids)
    parts = [
        Part(index, start, 1, [token], [b for of, b in decodes.new_blocks if of == row], True)
        for row, (index, start, token) in enumerate(zip(*columns, strict=True))
    ]
    for chunk in plan.chunks:
        start, count = chunk.num_computed_tokens, chunk.num_scheduled_tokens
        parts.append(Part(chunk.request_index, start, count, [], chunk.block_ids, chunk.samples))
    return parts
