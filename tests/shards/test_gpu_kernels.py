"""The kernels for GPUs, interpreted on a CPU: attention beside dense attention in fp64, and decoder
layers beside the library's modules. Triton's interpreter multiplies no bf16.
"""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardline_shards import fused, mesh_communicators
from shardline_shards.attention import BACKENDS, triton_backend
from shardline_shards.gpu_stack import GpuStack
from shardline_shards.stage import Stage
from tests.shards.ranks import RankPool
from tests.shards.test_attention import Case, Problem, lay_out
from tests.shards.test_families import LAYOUTS, NUM_TOKENS, make_plans, run_rank
from tests.shards.test_fused import build, run
from tests.tiny import save_tiny

CPU = torch.device("cpu")
TRITON = BACKENDS["triton"]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# A unit in the last place. Outputs are rounded, and each weight, before values are multiplied.
EPSILON = {torch.float32: 2.0**-20, torch.float16: 2.0**-10}

# What is masked is computed nevertheless, and numpy, which interprets, says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


def check(problem: Problem) -> None:
    """Each output within the roundings of what is summed."""
    summed = replace(problem, values=[value.abs() for value in problem.values]).dense()
    distance = (problem.attend(TRITON).double() - problem.dense()).abs()
    assert (distance <= EPSILON[problem.case.dtype] * summed + 1e-6).all()


lengths_strategy = st.lists(
    st.one_of(
        st.integers(1, 700).map(lambda kv_len: (1, kv_len)),
        st.tuples(st.integers(2, 90), st.integers(0, 80)).map(lambda t: (t[0], t[0] + t[1])),
    ),
    min_size=1,
    max_size=4,
)
cases = st.builds(
    Case,
    lengths=lengths_strategy,
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    head_dim=st.sampled_from([8, 16, 20, 64, 96, 128]),
    block_size=st.sampled_from([1, 4, 16, 32, 256]),
    sliding_window=st.sampled_from([None, None, 1, 7, 64, 300, 1000]),
    softcap=st.sampled_from([None, None, 2.0]),
    dtype=st.sampled_from(list(EPSILON)),
)


@settings(max_examples=60, deadline=None)
@given(case=cases, seed=st.integers(0, 99))
def test_attention_is_dense_attention(case: Case, seed: int) -> None:
    check(lay_out(case, TRITON, seed))


@pytest.mark.parametrize("num_wanted", [1, 5, 100])
def test_a_row_has_the_same_bits_however_its_keys_are_dealt(
    num_wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To one program, to several, or one for each split; alone or beside others."""
    lengths = [(1, 1500), (40, 90), (1, 50), (1, 256), (64, 64)]
    problem = lay_out(Case(lengths=lengths, head_dim=64), TRITON)
    together = problem.attend(TRITON)
    monkeypatch.setattr(triton_backend, "_num_wanted", lambda device: num_wanted)
    assert torch.equal(problem.attend(TRITON), together)
    starts = problem.batch.query_start.tolist()
    for i, (query_len, kv_len) in enumerate(lengths):
        batch = replace(
            problem.batch,
            query_start=torch.tensor([0, query_len], dtype=torch.int32),
            kv_lens=torch.tensor([kv_len], dtype=torch.int32),
            block_tables=problem.batch.block_tables[i : i + 1],
            max_query_len=query_len,
            max_kv_len=kv_len,
        )
        alone = replace(problem, batch=batch).attend(TRITON, problem.queries[i])
        assert torch.equal(alone, together[starts[i] : starts[i + 1]])


def test_room_for_more_than_there_is_changes_nothing() -> None:
    """A recorded step is launched for the longest sequences that there may be."""
    problem = lay_out(Case(lengths=[(1, 300), (1, 9)]), TRITON)
    batch = replace(problem.batch, max_kv_len=4096)
    assert torch.equal(replace(problem, batch=batch).attend(TRITON), problem.attend(TRITON))


def test_a_sequence_that_broke_harms_no_other() -> None:
    lengths = [(80, 80), (17, 33), (1, 20), (1, 700), (1, 9)]
    problem = lay_out(Case(lengths=lengths, head_dim=64), TRITON)
    wanted = problem.attend(TRITON)
    for tokens in (problem.keys, problem.values):
        tokens[0].fill_(torch.nan)
        tokens[3].fill_(torch.nan)
    keys, values = torch.cat(problem.keys), torch.cat(problem.values)
    TRITON.write(problem.layer, keys, values, problem.old_slots)
    is_broken = torch.tensor([True, False, False, True, False])
    is_broken = is_broken.repeat_interleave(torch.tensor([count for count, _ in lengths]))
    output = problem.attend(TRITON)
    assert output[is_broken].isnan().all()
    assert torch.equal(output[~is_broken], wanted[~is_broken])


@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability: str, tmp_path: Path) -> None:
    """And take no more shared memory than the smallest of them has: 99 KiB."""
    program = Path(__file__).with_name("compile_gpu_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, program, capability], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 21
    assert all(int(line.split()[-1]) <= 99 << 10 for line in lines), done.stdout


def test_where_triton_cannot_run_a_gpu_s_layers_are_the_library_s(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Here for want of a GPU; where there is one, for want of a compiler."""
    triton_backend.has_triton.cache_clear()
    gpu = torch.device("cuda")
    with caplog.at_level(logging.WARNING):
        assert not TRITON.serves(gpu, torch.bfloat16)
        assert fused.stack_class(gpu) is None
    (record,) = caplog.records
    assert "apt install gcc python3-dev" in record.message


@pytest.fixture
def on_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "stack_class", lambda device: GpuStack)


def stage(folder: Path, dtype: torch.dtype = torch.float32) -> Stage:
    stage = Stage(build(folder, dtype), CPU)
    assert stage.is_fused
    return stage


LENGTHS = [7, 1, 12, 3, 1, 1, 5]


@pytest.mark.usefixtures("on_gpu_kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_those_of_the_library(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path)
    modules = run(Stage(build(folder), CPU, allow_fused=False), LENGTHS)
    torch.testing.assert_close(run(stage(folder), LENGTHS), modules, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("on_gpu_kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_is_as_good_as_the_library_s_own(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path)
    exact = run(Stage(build(folder), CPU, allow_fused=False), LENGTHS)
    modules = Stage(build(folder, torch.float16), CPU, allow_fused=False)
    ours, theirs = (
        run(one, LENGTHS).float().sub(exact).abs().mean()
        for one in (stage(folder, torch.float16), modules)
    )
    assert ours <= 1.5 * theirs


@pytest.mark.usefixtures("on_gpu_kernels")
def test_sizes_that_fill_no_program(tmp_path: Path) -> None:
    """Heads, widths and columns beside what one program takes."""
    sizes = {"hidden_size": 80, "intermediate_size": 1100, "head_dim": 20}
    folder = save_tiny("qwen3", tmp_path, **sizes)
    modules = run(Stage(build(folder), CPU, allow_fused=False), LENGTHS)
    torch.testing.assert_close(run(stage(folder), LENGTHS), modules, rtol=0, atol=1e-4)


def run_rank_on_gpu_kernels(store: dist.Store, rank: int, *args: object) -> object:
    """GPUs share no memory with each other, so sums go by messages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "stack_class", lambda device: GpuStack)
        patch.setattr(mesh_communicators, "share_memory", lambda exchange: None)
        return run_rank(store, rank, *args)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["1x2", "2x1", "2x2"])
def test_shards_are_the_whole(tmp_path: Path, layout: str, ranks: RankPool) -> None:
    """Half a layer at a time and summed over ranks, and cut into stages."""
    folder = save_tiny("qwen3", tmp_path)
    plans = make_plans([[3 + i for i in range(NUM_TOKENS)], [7 + i for i in range(NUM_TOKENS)]])

    def logits(function: object, name: str) -> dict[tuple[int, int], Tensor]:
        size = LAYOUTS[name].world_size
        last = size - LAYOUTS[name].tp
        answers = ranks.call(function, size, LAYOUTS[name], folder, "float32", plans)
        return {place: torch.tensor(row) for place, row in answers[last][0].items()}

    whole, split = logits(run_rank, "1x1"), logits(run_rank_on_gpu_kernels, layout)
    assert whole.keys() == split.keys()
    for place, row in split.items():
        torch.testing.assert_close(row, whole[place], rtol=0, atol=1e-4)
