"""Decode steps on a GPU as CUDA graphs, recorded once for a ladder of batch sizes.

A step in which every request computes one token is padded to the next rung and replayed in one
launch, where Python would otherwise launch some ten kernels a layer one after the other. Other
steps run as they are. The rows that pad a step write their keys and values into a block of their
own, which the engine does not know of.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardline_shards.attention import PagedBatch
from shardline_shards.batch import BatchBuilder, StepBatch
from shardline_shards.stage import Stage

logger = logging.getLogger(__name__)

LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def sizes_up_to(max_size: int) -> tuple[int, ...]:
    """The rungs that decodes of up to `max_size` requests need, at most the whole ladder."""
    return LADDER[: bisect_left(LADDER, max_size) + 1]


Run = Callable[[], Tensor]
Record = Callable[[Run], Run]


class CudaRecorder:
    """Records what runs as a CUDA graph; all graphs share one pool of memory.

    Results lie in that pool: they hold until the next replay of any of the graphs.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """A function that replays `run` and returns the tensor that it returned."""
        self._warm_up(run)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    @staticmethod
    def _warm_up(run: Run) -> None:
        """Libraries allocate and choose kernels at their first call, which no graph may hold."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)


@dataclass(frozen=True, slots=True)
class _Rung:
    """A recorded size: the tensors that it reads, and its replay."""

    batch: StepBatch
    hidden: Tensor | None
    replay: Run


class DecodeGraphs:
    """Runs a stage's steps, decodes of up to the largest recorded size by replay."""

    def __init__(
        self,
        stage: Stage,
        batches: BatchBuilder,
        record: Record,
        *,
        max_model_len: int,
        scratch_block: int,
        sizes: Sequence[int] = LADDER,
    ) -> None:
        """Record every one of `sizes`, which ascend; the largest first, whose memory others reuse.

        `scratch_block` is a block of KV memory that no request is given.
        """
        self._stage = stage
        self._scratch_block = scratch_block
        self._scratch_slot = scratch_block * batches.block_size
        self._sizes = list(sizes)
        self._rungs: dict[int, _Rung] = {}
        width = -(-max_model_len // batches.block_size)
        for size in reversed(self._sizes):
            batch = self._static_batch(batches, size, width, max_model_len)
            hidden = None if stage.is_first else self._static_hidden(batches, size)
            replay = record(lambda batch=batch, hidden=hidden: stage.run(batch, hidden))  # type: ignore[misc]
            self._rungs[size] = _Rung(batch, hidden, replay)

    def run(self, batch: StepBatch, hidden: Tensor | None) -> Tensor:
        """See `Stage.run`."""
        rung = self._find_rung(batch)
        if rung is None:
            return self._stage.run(batch, hidden)
        count = batch.num_tokens
        self._fill(rung.batch, batch)
        if rung.hidden is not None:
            assert hidden is not None
            rung.hidden[:count].copy_(hidden)
        output = rung.replay()[:count]
        # What the next stage is sent has to outlive the next replay.
        return output if self._stage.is_last else output.clone()

    def _find_rung(self, batch: StepBatch) -> _Rung | None:
        is_decode = batch.paged.max_query_len == 1 and len(batch.drawing) == batch.num_tokens
        place = bisect_left(self._sizes, batch.num_tokens)
        if not is_decode or place == len(self._sizes):
            return None
        return self._rungs[self._sizes[place]]

    def _fill(self, static: StepBatch, batch: StepBatch) -> None:
        """Copy a step into the tensors of its rung; what is left over writes to scratch."""
        count, width = batch.paged.block_tables.shape
        for target, source, padding in (
            (static.input_ids, batch.input_ids, 0),
            (static.positions, batch.positions, 0),
            (static.paged.kv_lens, batch.paged.kv_lens, 1),
            (static.paged.slots, batch.paged.slots, self._scratch_slot),
        ):
            target[:count].copy_(source)
            target[count:].fill_(padding)
        static.paged.block_tables[:count, :width].copy_(batch.paged.block_tables)
        static.paged.block_tables[count:, 0].fill_(self._scratch_block)

    def _static_batch(
        self, batches: BatchBuilder, size: int, width: int, max_model_len: int
    ) -> StepBatch:
        """A step of `size` decodes that are all padding."""
        device = batches.device
        return StepBatch(
            input_ids=torch.zeros(size, dtype=torch.int64, device=device),
            positions=torch.zeros(size, dtype=torch.int64, device=device),
            logit_indexes=torch.arange(size, device=device),
            drawing=[],
            prompt_rows=[],
            paged=PagedBatch(
                query_start=torch.arange(size + 1, dtype=torch.int32, device=device),
                kv_lens=torch.ones(size, dtype=torch.int32, device=device),
                block_tables=torch.full(
                    (size, width), self._scratch_block, dtype=torch.int32, device=device
                ),
                slots=torch.full((size,), self._scratch_slot, dtype=torch.int64, device=device),
                max_query_len=1,
                max_kv_len=max_model_len,
                kv_layers=batches.kv_layers,
                backend=batches.backend,
            ),
        )

    def _static_hidden(self, batches: BatchBuilder, size: int) -> Tensor:
        stage = self._stage
        return torch.zeros(size, stage.hidden_size, dtype=stage.dtype, device=batches.device)
