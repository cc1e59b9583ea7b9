"""Padding and replay of decode steps, with a recorder that needs no GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shardline_scheduler.plan import Chunk, Decodes, NewRequest, SamplingParams, StepPlan
from shardline_shards.attention import allocate_kv, select_backend
from shardline_shards.batch import BatchBuilder, RequestTable, StepBatch
from shardline_shards.checkpoint import load_weights
from shardline_shards.collectives import SingleRank
from shardline_shards.decode_graphs import DecodeGraphs, Run
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.stage import Stage
from shardline_shards.stage_model import build_stage_model, load_config
from shardline_shards.upload import move_together
from tests.tiny import VOCAB_SIZE, save_tiny

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 4, 40, 64
SCRATCH = NUM_BLOCKS
SIZES = (1, 2, 4)


class Recorder:
    """As a CUDA graph does, a replay runs again on the same tensors and writes to the same one."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, run: Run) -> Run:
        output = run().clone()

        def replay() -> Tensor:
            self.num_replays += 1
            return output.copy_(run())

        return replay


class OneStage:
    """A stage of a tiny model with its KV memory; prompt i has the tokens i, i + 1, …"""

    def __init__(self, folder: Path, place: Place, stage_layers: tuple[int, ...]) -> None:
        layout = ParallelLayout(tp=1, stage_layers=stage_layers)
        model = build_stage_model(
            load_config(folder), layout, place, SingleRank(), torch.float32, CPU
        )
        load_weights(model, folder, CPU)
        self.stage = Stage(model, CPU, allow_fused=False)
        shape = self.stage.kv_shape(BLOCK_SIZE, 1, 0)
        layers = layout.layers(place.stage_index)
        self.kv = allocate_kv(layers, NUM_BLOCKS + 1, shape, CPU)
        backend = select_backend(CPU, torch.float32)
        self.batches = BatchBuilder(self.kv, BLOCK_SIZE, backend, CPU)
        self.requests = RequestTable()

    def graphs(self, recorder: Recorder) -> DecodeGraphs:
        return DecodeGraphs(
            self.stage,
            self.batches,
            recorder,
            max_model_len=MAX_MODEL_LEN,
            scratch_block=SCRATCH,
            sizes=SIZES,
        )

    def step(self, plan: StepPlan) -> StepBatch:
        self.requests.apply(plan)
        return self.batches.build(plan, self.requests)

    def kept(self) -> list[Tensor]:
        """KV memory without the scratch block."""
        return [part[:SCRATCH] for layer in self.kv.values() for part in (layer.key, layer.value)]


def plans(num_requests: int, num_decodes: int) -> list[StepPlan]:
    """One step with all prompts, of different lengths, then decodes of ever fewer requests."""
    sampling = SamplingParams(max_tokens=9, seed=0, temperature=0.0)
    lengths = [3 + 5 * index for index in range(num_requests)]
    blocks = [list(range(7 * index, 7 * index + 7)) for index in range(num_requests)]
    new = [
        NewRequest(i, [(i + j) % VOCAB_SIZE for j in range(length)], length, sampling)
        for i, length in enumerate(lengths)
    ]
    first = [Chunk(i, 0, n, blocks[i], True) for i, n in enumerate(lengths)]
    steps = [StepPlan(0, new_requests=new, chunks=first)]
    for step in range(num_decodes):
        count = num_requests - step % num_requests
        tokens = [11 + step + i for i in range(count)]
        decodes = Decodes(list(range(count)), lengths[:count], tokens)
        steps.append(StepPlan(step + 1, decodes=decodes))
        lengths[:count] = [length + 1 for length in lengths[:count]]
    return steps


def hidden_for(stage: Stage, batch: StepBatch) -> Tensor | None:
    if stage.is_first:
        return None
    generator = torch.Generator().manual_seed(int(batch.positions.sum()))
    return torch.randn(batch.num_tokens, stage.hidden_size, generator=generator)


@pytest.mark.parametrize(
    ("place", "stage_layers"), [(Place(0, 0), (3,)), (Place(0, 0), (2, 1)), (Place(1, 0), (2, 1))]
)
def test_replayed_decodes_are_what_the_stage_computes(
    tmp_path: Path, place: Place, stage_layers: tuple[int, ...]
) -> None:
    folder = save_tiny("llama", tmp_path)
    plain, padded = (OneStage(folder, place, stage_layers) for _ in range(2))
    recorder = Recorder()
    graphs = padded.graphs(recorder)
    for part in padded.kept():
        assert not part.any(), "recording wrote to memory of requests"
    expected, outputs = [], []
    for plan in plans(num_requests=5, num_decodes=12):
        batch = plain.step(plan)
        hidden = hidden_for(plain.stage, batch)
        expected.append(plain.stage.run(batch, hidden))
        output = graphs.run(padded.step(plan), hidden)
        outputs.append(output.clone() if padded.stage.is_last else output)
    # One step of five prompts, and three in which all five decode, are beyond the largest size.
    assert recorder.num_replays == 12 - 3
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    for ours, theirs in zip(padded.kept(), plain.kept(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_step_with_a_part_of_a_prompt_is_not_replayed(tmp_path: Path) -> None:
    one = OneStage(save_tiny("llama", tmp_path), Place(0, 0), (3,))
    recorder = Recorder()
    graphs = one.graphs(recorder)
    sampling = SamplingParams(max_tokens=9, seed=0, temperature=0.0)
    new = [NewRequest(0, [5, 6, 7], 3, sampling), NewRequest(1, [8], 1, sampling)]
    # One token of a prompt, without a token drawn, beside a request that draws.
    chunks = [Chunk(0, 0, 1, [0], False), Chunk(1, 0, 1, [1], True)]
    output = graphs.run(one.step(StepPlan(0, new_requests=new, chunks=chunks)), None)
    assert output.shape == (1, VOCAB_SIZE)
    assert recorder.num_replays == 0


def test_arrays_that_move_together_arrive_as_they_were() -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 99, 3, dtype=np.int64),
        rng.integers(0, 99, 5, dtype=np.int32),
        rng.integers(0, 99, (2, 3), dtype=np.int32),
        np.empty(0, dtype=np.int64),
        rng.integers(0, 99, 1, dtype=np.int64),
    ]
    moved = move_together(arrays, CPU, pin=False)
    for ours, array in zip(moved, arrays, strict=True):
        assert ours.dtype == torch.from_numpy(array).dtype
        assert np.array_equal(ours.numpy(), array)
