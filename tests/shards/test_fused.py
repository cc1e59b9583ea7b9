"""Which models the kernel takes whole, what makes it refuse, and that a row's result is its own."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardline_scheduler.plan import Chunk, NewRequest, SamplingParams, StepPlan
from shardline_shards import mesh_communicators
from shardline_shards.attention import KVShape, allocate_kv, select_backend
from shardline_shards.batch import BatchBuilder, RequestTable
from shardline_shards.checkpoint import load_weights
from shardline_shards.collectives import SingleRank
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.stage import Stage
from shardline_shards.stage_model import StageModel, build_stage_model, decoder_layers, load_config
from tests.shards.ranks import RankPool
from tests.shards.test_families import LAYOUTS, NUM_TOKENS, make_plans, run_rank
from tests.tiny import FAMILIES, VOCAB_SIZE, save_tiny

CPU = torch.device("cpu")
BLOCK_SIZE = 4
FUSED_FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
# Multiples of what tile registers multiply at once; others go another way, tiles or no tiles.
WHOLE_TILES = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16}
SIZES = {"odd sizes": {}, "whole tiles": WHOLE_TILES}


def build(folder: Path, dtype: torch.dtype = torch.float32) -> StageModel:
    layout = ParallelLayout(tp=1, stage_layers=(3,))
    model = build_stage_model(
        load_config(folder), layout, Place(0, 0), SingleRank(), dtype, torch.device("cpu")
    )
    load_weights(model, folder, CPU)
    return model


def run(stage: Stage, lengths: list[int]) -> Tensor:
    """Logits of the last token of each prompt; prompt i has the tokens i, i + 1, …"""
    config = stage.config
    shape = KVShape(
        block_size=BLOCK_SIZE,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        dtype=stage.dtype,
    )
    batches = BatchBuilder(
        allocate_kv(range(3), 64, shape, CPU), BLOCK_SIZE, select_backend(CPU, stage.dtype), CPU
    )
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    new, chunks, next_block = [], [], 0
    for index, length in enumerate(lengths):
        tokens = [(index + i) % VOCAB_SIZE for i in range(length)]
        blocks = list(range(next_block, next_block + -(-length // BLOCK_SIZE)))
        next_block += len(blocks)
        new.append(NewRequest(index, tokens, length, sampling))
        chunks.append(Chunk(index, 0, length, blocks, True))
    requests, plan = RequestTable(), StepPlan(0, new_requests=new, chunks=chunks)
    requests.apply(plan)
    return stage.run(batches.build(plan, requests), None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_takes_the_families_that_it_computes(family: str, tmp_path: Path) -> None:
    stage = Stage(build(save_tiny(family, tmp_path)), CPU)
    assert stage.is_fused == (family in FUSED_FAMILIES)


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads compute, for as long as the test takes."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Doubled(nn.Module):
    """A change inside a layer that nothing but the numbers can tell."""

    weight: Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.weight = inner.weight
        self.bias = None

    def forward(self, input: Tensor) -> Tensor:
        return 2 * nn.functional.linear(input, self.weight)


def test_layers_that_compute_something_else_stay_modules(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(save_tiny("llama", tmp_path))
    attention = decoder_layers(model.model)[0].self_attn
    attention.v_proj = Doubled(attention.v_proj)
    with caplog.at_level(logging.INFO, "shardline_shards.fused"):
        stage = Stage(model, CPU)
    assert not stage.is_fused
    assert "off the layer's own" in caplog.text
    assert run(stage, [3]).shape == (1, VOCAB_SIZE)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_has_the_same_bits_alone_and_among_others(
    tmp_path: Path, dtype: torch.dtype, sizes: dict[str, int]
) -> None:
    folder = save_tiny("qwen3", tmp_path, **sizes)
    stage = Stage(build(folder, dtype), CPU)
    assert stage.is_fused
    lengths = [7, 1, 12, 3, 1, 1, 5]
    together = run(stage, lengths)
    for length in (7, 30, 100):
        assert torch.equal(run(stage, [length, *lengths[1:]])[1:], together[1:])
    assert torch.equal(run(stage, lengths[:1]), together[:1])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("lengths", [[1], [15], [16], [17], [33], [70, 1, 1, 90]])
def test_bf16_is_as_good_as_the_library_s_own_products(
    tmp_path: Path, lengths: list[int], sizes: dict[str, int]
) -> None:
    """As far from fp32 as the modules are in bf16, with any number of rows in a product."""
    folder = save_tiny("qwen3", tmp_path, **sizes)
    exact = run(Stage(build(folder), CPU, allow_fused=False), lengths)
    fused = Stage(build(folder, torch.bfloat16), CPU)
    modules = Stage(build(folder, torch.bfloat16), CPU, allow_fused=False)
    assert fused.is_fused
    ours, theirs = (run(stage, lengths).sub(exact).abs().mean() for stage in (fused, modules))
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1, 1, 1], [6], [40, 1, 9]], ids=str)
def test_threads_that_lose_their_cores_are_not_waited_for_and_change_nothing(
    tmp_path: Path, lengths: list[int], set_num_threads: Callable[[int], None]
) -> None:
    """There are many more threads than cores, so most of them stand still in the midst of a task
    that others do meanwhile, and go on with it when that is long past.
    """
    stage = Stage(build(save_tiny("qwen3", tmp_path, **WHOLE_TILES), torch.bfloat16), CPU)
    assert stage.is_fused
    set_num_threads(1)
    alone = run(stage, lengths)
    set_num_threads(8 * (os.cpu_count() or 1))
    for _ in range(30):
        assert torch.equal(run(stage, lengths), alone)


def test_positions_beyond_the_first_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardline_shards.fused._FIRST_TABLE_SIZE", 8)
    folder = save_tiny("llama", tmp_path)
    fused, modules = Stage(build(folder), CPU), Stage(build(folder), CPU, allow_fused=False)
    assert fused.is_fused and not modules.is_fused
    lengths = [40, 9]
    torch.testing.assert_close(run(fused, lengths), run(modules, lengths), rtol=0, atol=1e-4)


def run_rank_by_messages(store: dist.Store, rank: int, *args: object) -> object:
    """As where the ranks of a stage are on several nodes."""
    share_memory = mesh_communicators.share_memory
    mesh_communicators.share_memory = lambda exchange: None
    try:
        return run_rank(store, rank, *args)  # type: ignore[arg-type]
    finally:
        mesh_communicators.share_memory = share_memory


@pytest.mark.parametrize("layout", ["2x1", "2x2"])
def test_shards_give_the_same_bits_by_memory_and_by_messages(
    tmp_path: Path, layout: str, ranks: RankPool
) -> None:
    folder = save_tiny("qwen3", tmp_path)
    plans = make_plans([[3 + i for i in range(NUM_TOKENS)], [7 + i for i in range(NUM_TOKENS)]])
    arguments = (LAYOUTS[layout], folder, "bfloat16", plans)
    size = LAYOUTS[layout].world_size
    by_memory = ranks.call(run_rank, size, *arguments)[size - 2][0]
    by_messages = ranks.call(run_rank_by_messages, size, *arguments)[size - 2][0]
    assert by_memory == by_messages and by_memory
