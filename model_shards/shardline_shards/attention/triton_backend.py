"""Paged attention on GPUs by Triton, which comes with torch's builds for them.

Takes any size of block, any group of query heads, windows and soft caps. With TRITON_INTERPRET=1
its kernels run on a CPU, one program after the other: right, but only good for tests.
"""

import functools
import importlib.util
import logging
import subprocess
from dataclasses import dataclass

import torch
from torch import Tensor

from shardline_shards.attention.interface import KVLayer, PagedBatch
from shardline_shards.attention.reference import ReferenceBackend

logger = logging.getLogger(__name__)

_SPLIT = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonBackend:
    """Computes in fp32; weights are rounded to the dtype of the values that they multiply.

    A row's result is its own, whatever else the batch holds.
    """

    name = "triton"
    block_size = 16

    def __init__(self) -> None:
        self._reference = ReferenceBackend()

    def serves(self, device: torch.device, dtype: torch.dtype) -> bool:
        """GPUs from compute capability 8.0 on."""
        if device.type != "cuda" or dtype not in _DTYPES or not has_triton():
            return False
        return torch.cuda.get_device_capability(device) >= (8, 0)

    def write(self, layer: KVLayer, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """See `AttentionBackend.write`."""
        self._reference.write(layer, key, value, slots)

    def attend(
        self,
        query: Tensor,
        layer: KVLayer,
        batch: PagedBatch,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        query = query if query.stride(-1) == 1 else query.contiguous()
        call = _Call(query, layer, batch, scaling, sliding_window or 0, softcap or 0.0)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if batch.max_query_len > 1:
            call.attend_chunks(output)
        call.attend_singles(output)
        return output


@dataclass(frozen=True, slots=True)
class _Call:
    """What is asked for; 0 stands for no window and for no cap."""

    query: Tensor
    layer: KVLayer
    batch: PagedBatch
    scaling: float
    window: int
    softcap: float

    def attend_chunks(self, output: Tensor) -> None:
        """The sequences with more than one query."""
        from shardline_shards.attention import triton_kernels

        tile, num_seqs = self._tile, len(self.batch.kv_lens)
        num_tiles = len(self.query) // (tile.chunk_rows // self._group) + num_seqs
        triton_kernels.attend_chunks[(num_tiles, self._num_kv_heads)](
            output,
            *self._inputs,
            num_seqs,
            self.scaling,
            *self._strides,
            *self._constants,
            tile.chunk_rows,
            tile.keys,
            num_warps=8,
            num_stages=2,
        )

    def attend_singles(self, output: Tensor) -> None:
        """The sequences with one query."""
        from shardline_shards.attention import triton_kernels

        num_seqs, num_heads = len(self.batch.kv_lens), self.query.shape[1]
        max_splits = -(-self.batch.max_kv_len // _SPLIT)
        num_shares = self._num_shares(max_splits)
        is_shared = num_shares > 1
        size = (num_seqs, num_heads, max_splits) if is_shared else (0,)
        sums, scales = (
            torch.empty(*size, width, dtype=torch.float32, device=self.query.device)
            for width in (self._head_dim, 2)
        )
        triton_kernels.attend_singles[(num_seqs, self._num_kv_heads, num_shares)](
            output,
            sums,
            scales,
            *self._inputs,
            self.scaling,
            max_splits,
            *self._strides,
            *self._constants,
            self._tile.single_rows,
            self._tile.keys,
            _SPLIT,
            is_shared,
            num_warps=4,
            num_stages=3,
        )
        if is_shared:
            triton_kernels.merge_splits[(num_seqs, num_heads)](
                output,
                sums,
                scales,
                self.batch.query_start,
                self.batch.kv_lens,
                max_splits,
                num_heads,
                self._head_dim,
                self._dim,
                self.window,
                _SPLIT,
                num_warps=1,
            )

    def _num_shares(self, max_splits: int) -> int:
        """Among how many programs the splits of a sequence are dealt."""
        num_programs = len(self.batch.kv_lens) * self._num_kv_heads
        return min(max_splits, -(-_num_wanted(self.query.device) // num_programs))

    @property
    def _head_dim(self) -> int:
        return self.query.shape[2]

    @property
    def _dim(self) -> int:
        return width_of(self._head_dim)

    @property
    def _tile(self) -> "Tile":
        return Tile.of(self._group, self._head_dim, self.query.element_size())

    @property
    def _num_kv_heads(self) -> int:
        return self.layer.key.shape[2]

    @property
    def _group(self) -> int:
        return self.query.shape[1] // self._num_kv_heads

    @property
    def _inputs(self) -> tuple[Tensor, ...]:
        batch = self.batch
        paging = (batch.query_start, batch.kv_lens, batch.block_tables)
        return self.query, self.layer.key, self.layer.value, *paging

    @property
    def _strides(self) -> tuple[int, ...]:
        tables = self.batch.block_tables
        return *self.query.stride()[:2], self.layer.key.stride(0), tables.stride(0)

    @property
    def _constants(self) -> tuple[int | float, ...]:
        block_size = self.layer.key.shape[1]
        shape = (self._num_kv_heads, self._group, self._head_dim, self._dim, block_size)
        return *shape, self.window, self.softcap


@dataclass(frozen=True, slots=True)
class Tile:
    """How many rows of queries, and how many keys, a program has at hand at a time."""

    chunk_rows: int
    single_rows: int
    keys: int

    @classmethod
    def of(cls, group: int, head_dim: int, element_bytes: int) -> "Tile":
        """As large as fits the shared memory of every GPU that is served: 99 KiB."""
        heads = power_of_two(group)
        share = max(1, width_of(head_dim) * element_bytes // 256)
        least = max(MIN_WIDTH, heads)
        return cls(max(128 // share, least), least, max(64 // share, MIN_WIDTH))


MIN_WIDTH = 16  # of what tensor cores multiply, in each direction


def width_of(head_dim: int) -> int:
    """How many elements a head has where it is multiplied."""
    return max(MIN_WIDTH, power_of_two(head_dim))


@functools.cache
def _num_wanted(device: torch.device) -> int:
    """Programs that keep a device busy."""
    if device.type == "cpu":
        return 16
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_two(number: int) -> int:
    """The smallest that is not below `number`."""
    return 1 << (number - 1).bit_length()


@functools.cache
def has_triton() -> bool:
    """Whether Triton can run kernels on this node's GPUs; one warning where it cannot."""
    if importlib.util.find_spec("triton") is None:
        logger.warning("GPUs run the library's slower layers: Triton is not installed")
        return False
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        logger.warning(
            "GPUs run the library's slower layers: Triton cannot run (%s); it needs a C compiler "
            "and Python's headers (Debian, Ubuntu: apt install gcc python3-dev)",
            error,
        )
        return False
    return True
