"""Paged attention on CPUs, by the kernel in `csrc`; see there for how it works."""

import functools
import logging

import torch
from torch import Tensor

from shardline_shards.attention.build import BuildError, build
from shardline_shards.attention.interface import KVLayer, PagedBatch

logger = logging.getLogger(__name__)


class CpuBackend:
    """Reads blocks in place; bf16, fp16 and fp32, computed in fp32."""

    name = "cpu"
    block_size = 16

    def serves(self, device: torch.device, dtype: torch.dtype) -> bool:
        """CPUs on which the kernel is built or can be built now; that takes 40 s, once."""
        is_served = dtype in (torch.bfloat16, torch.float16, torch.float32)
        return device.type == "cpu" and is_served and load_kernel()

    def write(self, layer: KVLayer, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """See `AttentionBackend.write`."""
        torch.ops.shardline.write(_dense(key), _dense(value), layer.key, layer.value, slots)

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
        output: Tensor = torch.ops.shardline.attend(
            _dense(query),
            layer.key,
            layer.value,
            batch.query_start,
            batch.kv_lens,
            batch.block_tables,
            scaling,
            sliding_window,
            softcap,
        )
        return output


def _dense(states: Tensor) -> Tensor:
    """The kernel takes any strides but the last."""
    return states if states.stride(-1) == 1 else states.contiguous()


@functools.cache
def load_kernel() -> bool:
    """Load the kernel, compiled first if need be; False, and one warning, where that cannot be."""
    try:
        torch.ops.load_library(build())  # type: ignore[no-untyped-call]
    except (BuildError, OSError) as error:
        logger.warning(
            "attention runs on the slow reference: %s. "
            "Then run `python -m shardline_shards.attention.build` to see that it works",
            error,
        )
        return False
    return True
