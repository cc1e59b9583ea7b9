"""What a worker remembers of requests, and how a plan becomes the tensors of one step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardline_scheduler.plan import (
    LAST_DRAWN,
    NewRequest,
    SamplingParams,
    ScheduledRequest,
    StepPlan,
)
from shardline_shards.attention import AttentionBackend, KVLayer, PagedBatch
from shardline_shards.upload import upload


@dataclass(slots=True)
class RequestState:
    """One live request: its tokens so far and where their keys and values lie.

    `last_drawn` is the token that was drawn last for it, which becomes one of its tokens when the
    engine says so. Other ranks than the one that draws may not know it, and have LAST_DRAWN in its
    place: the first stage's until it has come there, others for good, since they need no tokens.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    block_ids: list[int] = field(default_factory=list)
    last_drawn: int = LAST_DRAWN

    def extend(self, token_ids: Sequence[int]) -> None:
        """Tokens of a plan follow."""
        for token in token_ids:
            if token == LAST_DRAWN:
                token = self.last_drawn
            self.token_ids.append(token)


@dataclass(frozen=True, slots=True)
class LogitRow:
    """A row of the step's logits: for the token that follows position `position` of a request."""

    request_index: int
    position: int
    samples: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """The tensors of one step, the same on every rank; requests lie one after the other.

    input_ids   int64 [num_tokens]
    positions   int64 [num_tokens]
    logit_rows  which tokens need logits: indexes into [0, num_tokens), in the order of `rows`
    """

    input_ids: Tensor
    positions: Tensor
    logit_indexes: Tensor
    rows: list[LogitRow]
    paged: PagedBatch

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return len(self.input_ids)


class RequestTable:
    """The requests that the engine has told this worker about, by request index.

    `num_blocks_used` is one more than the largest id of a block that any of them was given: blocks
    that nobody has used yet are given in their order.
    """

    def __init__(self) -> None:
        self._requests: dict[int, RequestState] = {}
        self.num_blocks_used = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_index: int) -> bool:
        return request_index in self._requests

    def __getitem__(self, request_index: int) -> RequestState:
        return self._requests[request_index]

    def apply(self, plan: StepPlan) -> None:
        """Forget, learn, extend: everything of a plan but the computing."""
        for request_index in plan.released:
            del self._requests[request_index]
        for new in plan.new_requests:
            self._learn(new)
        for scheduled in plan.scheduled:
            request = self._requests[scheduled.request_index]
            request.extend(scheduled.token_ids)
            if scheduled.block_ids:
                request.block_ids.extend(scheduled.block_ids)
                self.num_blocks_used = max(self.num_blocks_used, max(scheduled.block_ids) + 1)

    def _learn(self, new: NewRequest) -> None:
        self._requests[new.request_index] = RequestState(
            list(new.token_ids), new.num_prompt_tokens, new.sampling
        )


@dataclass(frozen=True, slots=True)
class BatchBuilder:
    """Builds step tensors for one worker."""

    kv_layers: Mapping[int, KVLayer]
    block_size: int
    backend: AttentionBackend
    device: torch.device

    def build(self, plan: StepPlan, requests: RequestTable) -> StepBatch:
        """The tensors of `plan`, which has been applied to `requests` and schedules something.

        Everything is a list first: between two steps the caches hold weights, and one loop is
        back in them sooner than a dozen of numpy's functions.
        """
        scheduled, size = plan.scheduled, self.block_size
        tables = [requests[entry.request_index].block_ids for entry in scheduled]
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start, kv_lens = [0], []
        for entry, blocks in zip(scheduled, tables, strict=True):
            start = entry.num_computed_tokens
            end = start + entry.num_scheduled_tokens
            token_ids += requests[entry.request_index].token_ids[start:end]
            positions += range(start, end)
            for i in range(start // size, -(-end // size)):
                shift = (blocks[i] - i) * size
                slots += range(max(start, i * size) + shift, min(end, (i + 1) * size) + shift)
            query_start.append(len(positions))
            kv_lens.append(end)
        rows, indexes = _logit_rows(scheduled, query_start, requests)
        arrays = (
            np.array(token_ids, dtype=np.int64),
            np.array(positions, dtype=np.int64),
            np.array(indexes, dtype=np.int64),
            np.array(query_start, dtype=np.int32),
            np.array(kv_lens, dtype=np.int32),
            _block_tables(tables),
            np.array(slots, dtype=np.int64),
        )
        ids, places, logit_indexes, first, lens, block_tables, to = upload(arrays, self.device)
        return StepBatch(
            input_ids=ids,
            positions=places,
            logit_indexes=logit_indexes,
            rows=rows,
            paged=PagedBatch(
                query_start=first,
                kv_lens=lens,
                block_tables=block_tables,
                slots=to,
                max_query_len=max(entry.num_scheduled_tokens for entry in scheduled),
                max_kv_len=max(kv_lens),
                kv_layers=self.kv_layers,
                backend=self.backend,
            ),
        )


def _block_tables(tables: list[list[int]]) -> NDArray[np.int32]:
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded


def _logit_rows(
    scheduled: list[ScheduledRequest], query_start: list[int], requests: RequestTable
) -> tuple[list[LogitRow], list[int]]:
    """Rows for prompt logprobs (every prompt token but the last) and for the tokens to be drawn."""
    rows: list[LogitRow] = []
    indexes: list[int] = []
    for entry, start in zip(scheduled, query_start, strict=False):
        first, last = (
            entry.num_computed_tokens,
            entry.num_computed_tokens + entry.num_scheduled_tokens,
        )
        request = requests[entry.request_index]
        if request.sampling.num_prompt_logprobs is not None:
            for position in range(first, min(last, request.num_prompt_tokens - 1)):
                rows.append(LogitRow(entry.request_index, position, False))
                indexes.append(start + position - first)
        if entry.samples:
            rows.append(LogitRow(entry.request_index, last - 1, True))
            indexes.append(start + last - 1 - first)
    return rows, indexes
