"""Measures what the parts of a model take on this host, through the same Stage that serves.

Stages of one and of a few layers, with and without the two ends, run with random weights a step of
decodes, and one of the same decodes and a chunk of a prompt; what each part takes follows by least
squares. One shard is measured where there are several, and what shards say to each other is left
out.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from shardline_scheduler.plan import Chunk, NewRequest, SamplingParams, StepPlan
from shardline_shards.attention import KVLayer, allocate_kv, select_backend
from shardline_shards.batch import BatchBuilder, RequestTable, StepBatch
from shardline_shards.checkpoint import load_dummy
from shardline_shards.collectives import SingleRank
from shardline_shards.errors import ShardError
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.messages import ProfileConfig, ProfileOutcome
from shardline_shards.partition import LayerTimes
from shardline_shards.sampling import sample
from shardline_shards.stage import Stage
from shardline_shards.stage_model import StageModel, build_stage_model, decoder_layers, load_config

_NUM_DECODES = 16
_CONTEXT = 256
_CHUNK = 256
# Four tokens in for each one out (4.6 in Azure's trace of conversations, 2023): a step ends a
# quarter of a request of 256 in and 64 out, so in a quarter of them the next prompt goes along.
_PREFILL_SHARE = _NUM_DECODES / 64
_BLOCK_SIZE = 256  # a whole number of pages on every device
_LAYERS_BEHIND_ONE_ANOTHER = 3
_NUM_RUNS = 12
# A stage that serves reads its other layers before it comes back to one; read once before each run,
# so that a layer comes from memory as it will then, and not from a cache that holds it alone.
_BYTES_BETWEEN_RUNS = 1 << 27


class LoneShard(SingleRank):
    """The first shard of a stage, without the others: sums are its own part, so nothing travels."""

    def __init__(self, size: int) -> None:
        self.size = size

    def gather_last_dim(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Of the right shape; what the others would add is made up."""
        return torch.nn.functional.pad(tensor, (0, sum(sizes) - tensor.shape[-1]))


@dataclass(frozen=True, slots=True)
class _Sample:
    """Which contiguous layers a measured stage holds."""

    layers: range
    num_layers: int

    @property
    def layout_counts(self) -> tuple[int, ...]:
        counts = (self.layers.start, len(self.layers), self.num_layers - self.layers.stop)
        return tuple(count for count in counts if count)

    @property
    def stage_index(self) -> int:
        return int(self.layers.start > 0)

    def row(self, kinds: list[int]) -> list[float]:
        """How often it holds each unknown: the stage itself, prologue, epilogue, layer kinds."""
        held = [kinds[layer] for layer in self.layers]
        is_first, is_last = self.layers.start == 0, self.layers.stop == self.num_layers
        return [
            1.0,
            float(is_first),
            float(is_last),
            *(float(held.count(kind)) for kind in range(max(kinds) + 1)),
        ]


def profile_model(config: ProfileConfig) -> ProfileOutcome:
    """Times of the model's parts, in seconds of a usual step; or why they cannot be measured."""
    torch.set_num_threads(config.num_threads)
    try:
        return ProfileOutcome(_Profiler(config).run())
    except (ShardError, NotImplementedError) as error:
        return ProfileOutcome(None, str(error))


class _Profiler:
    def __init__(self, config: ProfileConfig) -> None:
        self.config = config
        self.device = torch.device(config.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.model_config: PreTrainedConfig = load_config(Path(config.model_path))
        self.num_layers = int(self.model_config.num_hidden_layers)
        num_elsewhere = _BYTES_BETWEEN_RUNS // 8
        self.elsewhere = torch.zeros(num_elsewhere, dtype=torch.int64, device=self.device)

    def run(self) -> LayerTimes:
        kinds = self._kinds()
        samples = choose_samples(kinds)
        seconds = [self._measure(sample) for sample in samples]
        rows = [sample.row(kinds) for sample in samples]
        stage_s, prologue_s, epilogue_s, *kind_s = np.linalg.lstsq(rows, seconds)[0].clip(min=0)
        return LayerTimes(
            float(stage_s),
            float(prologue_s),
            tuple(float(kind_s[kind]) for kind in kinds),
            float(epilogue_s),
        )

    def _kinds(self) -> list[int]:
        """A number for each layer, the same for layers of the same type and shapes."""
        whole = self._build(ParallelLayout(tp=self.config.tp, stage_layers=(self.num_layers,)), 0)
        types = getattr(self.model_config, "layer_types", None) or [""] * self.num_layers
        seen: dict[tuple[str, str], int] = {}
        return [
            seen.setdefault((types[index], _shapes(layer)), len(seen))
            for index, layer in enumerate(decoder_layers(whole.model))
        ]

    def _build(self, layout: ParallelLayout, stage_index: int) -> StageModel:
        return build_stage_model(
            self.model_config,
            layout,
            Place(stage_index, 0),
            LoneShard(self.config.tp),
            self.dtype,
            self.device,
        )

    @torch.inference_mode()
    def _measure(self, sample: _Sample) -> float:
        """Seconds of a usual step on a stage with these layers."""
        layout = ParallelLayout(tp=self.config.tp, stage_layers=sample.layout_counts)
        stage_model = self._build(layout, sample.stage_index)
        load_dummy(stage_model, self.device, seed=0)
        stage = Stage(stage_model, self.device)
        shape = stage.kv_shape(_BLOCK_SIZE, self.config.tp, 0)
        num_blocks = (_NUM_DECODES + 1) * _blocks_each()
        kv_layers = allocate_kv(sample.layers, num_blocks, shape, self.device)
        decode_s = self._time_step(stage, kv_layers, _plan(with_chunk=False))
        prefill_s = self._time_step(stage, kv_layers, _plan(with_chunk=True))
        return decode_s + _PREFILL_SHARE * (prefill_s - decode_s)

    def _time_step(self, stage: Stage, kv_layers: dict[int, KVLayer], plan: StepPlan) -> float:
        backend = select_backend(self.device, stage.dtype)
        requests = RequestTable()
        requests.apply(plan)
        batch = BatchBuilder(kv_layers, _BLOCK_SIZE, backend, self.device).build(plan, requests)
        hidden = None
        if not stage.is_first:
            hidden = torch.randn(
                batch.num_tokens, stage.hidden_size, dtype=stage.dtype, device=self.device
            )
        return self._fastest_time(lambda: _step(stage, batch, hidden, requests))

    def _fastest_time(self, step: Callable[[], None]) -> float:
        step()  # Kernels are chosen, memory is touched.
        times: list[float] = []
        for _ in range(_NUM_RUNS):
            self.elsewhere.sum()
            self._synchronize()
            started = time.perf_counter()
            step()
            self._synchronize()
            times.append(time.perf_counter() - started)
        return min(times)  # Whatever else runs on the host only ever adds.

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def choose_samples(kinds: list[int]) -> list[_Sample]:
    """The two ends, one layer of each kind that lies between them, and a few behind one another."""
    num_layers = len(kinds)
    inner = range(1, num_layers - 1)
    starts = {kinds[layer]: layer for layer in reversed(inner)}
    ranges = [range(1), range(num_layers - 1, num_layers)]
    ranges += [range(start, start + 1) for start in starts.values()]
    if len(inner) > 1:
        ranges.append(inner[:_LAYERS_BEHIND_ONE_ANOTHER])
    return [_Sample(layers, num_layers) for layers in ranges]


def _step(stage: Stage, batch: StepBatch, hidden: Tensor | None, requests: RequestTable) -> None:
    output = stage.run(batch, hidden)
    if stage.is_last:
        sample(output, [requests[index] for index in batch.drawing])


def _shapes(layer: nn.Module) -> str:
    return str([(name, tuple(weight.shape)) for name, weight in layer.named_parameters()])


def _blocks_each() -> int:
    return -(-(_CONTEXT + 1) // _BLOCK_SIZE)


def _plan(with_chunk: bool) -> StepPlan:
    chunks = [_last_tokens(index, _CONTEXT, 1) for index in range(_NUM_DECODES)]
    new = [_new(index, _CONTEXT + 1) for index in range(_NUM_DECODES)]
    if with_chunk:
        chunks.append(_last_tokens(_NUM_DECODES, 0, _CHUNK))
        new.append(_new(_NUM_DECODES, _CHUNK))
    return StepPlan(0, new_requests=new, chunks=chunks)


def _new(index: int, num_tokens: int) -> NewRequest:
    """Every other one draws; the rest take the likeliest token."""
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=float(index % 2))
    return NewRequest(index, [0] * num_tokens, num_tokens, sampling)


def _last_tokens(index: int, num_computed: int, num_scheduled: int) -> Chunk:
    first = index * _blocks_each()
    block_ids = list(range(first, first + _blocks_each()))
    return Chunk(index, num_computed, num_scheduled, block_ids, True)
