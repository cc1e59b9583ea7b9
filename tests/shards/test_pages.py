"""KV memory that is touched before tokens come to it."""

import psutil
import torch

from shardline_scheduler.plan import Chunk, Decodes, NewRequest, SamplingParams, StepPlan
from shardline_shards.attention import KVShape, PagesAhead, allocate_kv
from shardline_shards.batch import RequestTable

MIB = 1 << 20
SHAPE = KVShape(block_size=16, num_kv_heads=4, head_dim=64, dtype=torch.float32)
NUM_LAYERS = 4
NUM_BLOCKS = 128 * MIB // (NUM_LAYERS * SHAPE.block_bytes)


def resident_mib() -> float:
    return psutil.Process().memory_info().rss / MIB


def test_pages_are_had_some_way_ahead_of_the_blocks_in_use_and_nothing_is_changed() -> None:
    layers = allocate_kv(range(NUM_LAYERS), NUM_BLOCKS, SHAPE, torch.device("cpu"))
    layers[2].value[NUM_BLOCKS // 8].fill_(3.0)
    pages = PagesAhead(layers, ahead_bytes=32 * MIB)
    before = resident_mib()
    while pages.are_wanted(0):
        pages.touch()
    assert 28 <= resident_mib() - before <= 36
    while pages.are_wanted(NUM_BLOCKS // 2):
        pages.touch()
    assert 92 <= resident_mib() - before <= 100
    while pages.are_wanted(NUM_BLOCKS):
        pages.touch()
    assert all(not layer.key.any() for layer in layers.values())
    assert (layers[2].value[NUM_BLOCKS // 8] == 3.0).all()
    assert layers[2].value.count_nonzero() == layers[2].value[0].numel()


def test_a_worker_knows_how_far_blocks_are_used() -> None:
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    requests = RequestTable()
    new = [NewRequest(0, [1, 2], 2, sampling)]
    requests.apply(StepPlan(0, new_requests=new, chunks=[Chunk(0, 0, 2, [7, 5], True)]))
    assert requests.num_blocks_used == 8
    requests.apply(StepPlan(1, decodes=Decodes([0], [2], [9], [(0, 4)])))
    assert requests.num_blocks_used == 8
    requests.apply(StepPlan(2, decodes=Decodes([0], [3], [9], [(0, 9)])))
    requests.apply(StepPlan(3, [0]))
    assert requests.num_blocks_used == 10
