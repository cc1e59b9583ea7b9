"""What a worker remembers of requests, and how a plan becomes the tensors of one step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardline_scheduler.plan import LAST_DRAWN, Chunk, Decodes, NewRequest, StepPlan
from shardline_shards.attention import AttentionBackend, KVLayer, PagedBatch
from shardline_shards.sampling import SampleRow
from shardline_shards.upload import upload


@dataclass(slots=True)
class RequestState(SampleRow):
    """One live request: its tokens so far and where their keys and values lie.

    `last_drawn` is the token that was drawn last for it, which becomes one of its tokens when the
    engine says so. Other ranks than the one that draws may not know it, and have LAST_DRAWN in its
    place: the first stage's until it has come there, others for good, since they need no tokens.
    """

    block_ids: list[int] = field(default_factory=list)
    last_drawn: int = LAST_DRAWN


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of the step's logits that tell of a request's prompt: what follows each of the positions
    `start`, `start + 1`, …
    """

    request_index: int
    start: int
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """The tensors of one step, the same on every rank; requests lie one after the other.

    input_ids      int64 [num_tokens]
    positions      int64 [num_tokens]
    logit_indexes  int64 [num_rows], which tokens need logits: indexes into [0, num_tokens), first
                   those that a token is drawn from, for the requests `drawing`; then those of
                   `prompt_rows`
    """

    input_ids: Tensor
    positions: Tensor
    logit_indexes: Tensor
    drawing: list[int]
    prompt_rows: list[PromptRows]
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
        decodes = plan.decodes
        for request_index, token_id in zip(decodes.request_indexes, decodes.token_ids, strict=True):
            request = self._requests[request_index]
            request.token_ids.append(request.last_drawn if token_id == LAST_DRAWN else token_id)
        for row, block_id in decodes.new_blocks:
            self._give(decodes.request_indexes[row], (block_id,))
        for chunk in plan.chunks:
            self._give(chunk.request_index, chunk.block_ids)

    def _give(self, request_index: int, block_ids: Sequence[int]) -> None:
        if block_ids:
            self._requests[request_index].block_ids.extend(block_ids)
            self.num_blocks_used = max(self.num_blocks_used, max(block_ids) + 1)

    def _learn(self, new: NewRequest) -> None:
        self._requests[new.request_index] = RequestState(
            new.sampling, list(new.token_ids), new.num_prompt_tokens
        )


@dataclass(frozen=True, slots=True)
class BatchBuilder:
    """Builds step tensors for one worker."""

    kv_layers: Mapping[int, KVLayer]
    block_size: int
    backend: AttentionBackend
    device: torch.device

    def build(self, plan: StepPlan, requests: RequestTable) -> StepBatch:
        """The tensors of `plan`, which has been applied to `requests` and schedules something."""
        step = _Columns(self.block_size)
        step.add_decodes(plan.decodes, requests)
        for chunk in plan.chunks:
            step.add_chunk(chunk, requests[chunk.request_index])
        arrays = (
            np.array(step.token_ids, dtype=np.int64),
            np.array(step.positions, dtype=np.int64),
            np.array(step.drawn_at + step.told_at, dtype=np.int64),
            np.array(step.query_start, dtype=np.int32),
            np.array(step.kv_lens, dtype=np.int32),
            _block_tables(step.tables),
            np.array(step.slots, dtype=np.int64),
        )
        ids, places, logit_indexes, first, lens, block_tables, to = upload(arrays, self.device)
        return StepBatch(
            input_ids=ids,
            positions=places,
            logit_indexes=logit_indexes,
            drawing=plan.drawing_indexes,
            prompt_rows=step.prompt_rows,
            paged=PagedBatch(
                query_start=first,
                kv_lens=lens,
                block_tables=block_tables,
                slots=to,
                max_query_len=max((chunk.num_scheduled_tokens for chunk in plan.chunks), default=1),
                max_kv_len=max(step.kv_lens),
                kv_layers=self.kv_layers,
                backend=self.backend,
            ),
        )


@dataclass(slots=True)
class _Columns:
    """What becomes the tensors of a step. Lists first: between two steps the caches hold weights,
    and a few loops are back in them sooner than a dozen of numpy's functions.

    Tokens are drawn from the logits of tokens `drawn_at`; those of `told_at` tell of prompts.
    """

    block_size: int
    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    query_start: list[int] = field(default_factory=lambda: [0])
    kv_lens: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)
    drawn_at: list[int] = field(default_factory=list)
    told_at: list[int] = field(default_factory=list)
    prompt_rows: list[PromptRows] = field(default_factory=list)

    def add_decodes(self, decodes: Decodes, requests: RequestTable) -> None:
        """They come first."""
        size, states = self.block_size, [requests[index] for index in decodes.request_indexes]
        self.token_ids = [state.token_ids[-1] for state in states]
        self.positions = list(decodes.num_computed_tokens)
        self.tables = [state.block_ids for state in states]
        self.slots = [
            table[position // size] * size + position % size
            for table, position in zip(self.tables, self.positions, strict=True)
        ]
        self.kv_lens = [position + 1 for position in self.positions]
        self.query_start = list(range(len(states) + 1))
        self.drawn_at = list(range(len(states)))

    def add_chunk(self, chunk: Chunk, request: RequestState) -> None:
        """Behind what there is."""
        first, start = len(self.positions), chunk.num_computed_tokens
        end = start + chunk.num_scheduled_tokens
        self.token_ids += request.token_ids[start:end]
        self.positions += range(start, end)
        self._add_slots(request.block_ids, start, end)
        self.tables.append(request.block_ids)
        self.kv_lens.append(end)
        self.query_start.append(len(self.positions))
        if chunk.samples:
            self.drawn_at.append(len(self.positions) - 1)
        # Every prompt token but the last tells of the next one.
        num_told = min(end, request.num_prompt_tokens - 1) - start
        if request.sampling.num_prompt_logprobs is not None and num_told > 0:
            self.told_at += range(first, first + num_told)
            self.prompt_rows.append(PromptRows(chunk.request_index, start, num_told))

    def _add_slots(self, block_ids: list[int], start: int, end: int) -> None:
        size = self.block_size
        for i in range(start // size, -(-end // size)):
            shift = (block_ids[i] - i) * size
            self.slots += range(max(start, i * size) + shift, min(end, (i + 1) * size) + shift)


def _block_tables(tables: list[list[int]]) -> NDArray[np.int32]:
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded
