"""Paged attention, every backend that runs here, against dense attention in fp64."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardline_shards.attention import (
    BACKENDS,
    AttentionBackend,
    KVLayer,
    KVShape,
    PagedBatch,
    allocate_kv,
    select_backend,
)
from shardline_shards.attention.cpu import load_kernel

CPU = torch.device("cpu")
BACKENDS_HERE = [name for name, one in BACKENDS.items() if one.serves(CPU, torch.float32)]

# Keys and values are the same rounded numbers on both sides, and all backends compute in fp32; what
# is left is the rounding of the output to its dtype: half a unit in the last place, doubled.
RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@dataclass(frozen=True, kw_only=True)
class Case:
    """(query_len, kv_len) of each sequence, and everything else that matters."""

    lengths: list[tuple[int, int]]
    num_kv_heads: int = 2
    group: int = 3
    head_dim: int = 16
    block_size: int = 16
    sliding_window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def scaling(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class Problem:
    """A case with numbers: what each sequence holds, and where it lies in KV memory."""

    case: Case
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    layer: KVLayer
    batch: PagedBatch
    old_slots: Tensor

    def attend(self, backend: AttentionBackend, query: Tensor | None = None) -> Tensor:
        case = self.case
        return backend.attend(
            torch.cat(self.queries) if query is None else query,
            self.layer,
            self.batch,
            scaling=case.scaling,
            sliding_window=case.sliding_window,
            softcap=case.softcap,
        )

    def dense(self) -> Tensor:
        return torch.cat(
            [
                dense_attention(self.case, *sequence)
                for sequence in zip(self.queries, self.keys, self.values, strict=True)
            ]
        )


def dense_attention(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sequence, one query at a time, in fp64."""
    rows = []
    for i in range(len(query)):
        position = len(key) - len(query) + i
        first = 0 if case.sliding_window is None else max(0, position - case.sliding_window + 1)
        seen = slice(first, position + 1)
        heads = []
        for head in range(case.num_kv_heads * case.group):
            kv_head = head // case.group
            scores = key[seen, kv_head].double() @ query[i, head].double() * case.scaling
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            heads.append(scores.softmax(0) @ value[seen, kv_head].double())
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def lay_out(case: Case, backend: AttentionBackend, seed: int = 0) -> Problem:
    """Scatter the sequences over scrambled blocks of memory that is NaN everywhere else."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(case.dtype)

    num_blocks = [math.ceil(kv_len / case.block_size) for _, kv_len in case.lengths]
    order = torch.randperm(sum(num_blocks) + 2, generator=generator).tolist()
    tables = torch.zeros(len(case.lengths), max(num_blocks), dtype=torch.int32)
    for table, count in zip(tables, num_blocks, strict=True):
        table[:count] = torch.tensor([order.pop() for _ in range(count)])
    size = (sum(num_blocks) + 2, 3, 2, case.block_size, case.num_kv_heads, case.head_dim)
    memory = torch.full(size, math.nan, dtype=case.dtype)  # of three layers, block by block
    layer = KVLayer(memory[:, 1, 0], memory[:, 1, 1])
    queries, keys, values, slots = [], [], [], []
    for (query_len, kv_len), table in zip(case.lengths, tables, strict=True):
        queries.append(random(query_len, case.num_kv_heads * case.group, case.head_dim))
        keys.append(random(kv_len, case.num_kv_heads, case.head_dim))
        values.append(random(kv_len, case.num_kv_heads, case.head_dim))
        positions = torch.arange(kv_len)
        blocks = table[positions // case.block_size].long()
        slots.append(blocks * case.block_size + positions % case.block_size)
    all_slots = torch.cat(slots)
    backend.write(layer, torch.cat(keys), torch.cat(values), all_slots)
    query_lens = [query_len for query_len, _ in case.lengths]
    kv_lens = [kv_len for _, kv_len in case.lengths]
    batch = PagedBatch(
        query_start=torch.tensor([0, *query_lens]).cumsum(0).int(),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32),
        block_tables=tables,
        slots=all_slots,
        max_query_len=max(query_lens),
        max_kv_len=max(kv_lens),
        kv_layers={0: layer},
        backend=backend,
    )
    return Problem(case, queries, keys, values, layer, batch, all_slots)


def check(case: Case, backend: AttentionBackend, seed: int = 0) -> None:
    problem = lay_out(case, backend, seed)
    torch.testing.assert_close(
        problem.attend(backend).double(),
        problem.dense(),
        rtol=RELATIVE_TOLERANCE[case.dtype],
        atol=1e-5,
    )


@pytest.fixture(params=BACKENDS_HERE)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return BACKENDS[request.param]


lengths_strategy = st.lists(
    st.one_of(
        st.integers(1, 150).map(lambda kv_len: (1, kv_len)),
        st.tuples(st.integers(1, 70), st.integers(0, 80)).map(lambda t: (t[0], t[0] + t[1])),
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
    sliding_window=st.sampled_from([None, None, 1, 7, 64, 1000]),
    softcap=st.sampled_from([None, None, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


@pytest.mark.parametrize("name", BACKENDS_HERE)
@settings(max_examples=120, deadline=None)
@given(case=cases, seed=st.integers(0, 99))
def test_attention_is_dense_attention(name: str, case: Case, seed: int) -> None:
    check(case, BACKENDS[name], seed)


@pytest.mark.parametrize("dtype", RELATIVE_TOLERANCE)
def test_a_mixed_batch(backend: AttentionBackend, dtype: torch.dtype) -> None:
    lengths = [(1, 1), (1, 130), (65, 65), (33, 140), (2, 64), (1, 64), (1, 17)]
    check(Case(lengths=lengths, head_dim=64, dtype=dtype), backend)


@pytest.mark.parametrize("sliding_window", [None, 2500])
def test_a_lone_query_far_down_a_long_sequence(
    backend: AttentionBackend, sliding_window: int | None
) -> None:
    lengths = [(1, 5003), (1, 900), (1, 2048)]
    check(Case(lengths=lengths, sliding_window=sliding_window), backend)


@pytest.mark.parametrize("dtype", RELATIVE_TOLERANCE)
def test_scores_far_apart(backend: AttentionBackend, dtype: torch.dtype) -> None:
    """The largest score comes last, first and in between, and the rest underflows."""
    for place in (0, 70, 199):
        case = Case(lengths=[(1, 200), (40, 200)], head_dim=32, dtype=dtype)
        problem = lay_out(case, backend)
        for key, query in zip(problem.keys, problem.queries, strict=True):
            key[place] = 60.0
            query.fill_(2.0)
        backend.write(
            problem.layer, torch.cat(problem.keys), torch.cat(problem.values), problem.old_slots
        )
        tolerance = RELATIVE_TOLERANCE[dtype]
        torch.testing.assert_close(
            problem.attend(backend).double(), problem.dense(), rtol=tolerance, atol=1e-5
        )


@pytest.mark.parametrize("dtype", RELATIVE_TOLERANCE)
def test_a_sequence_that_broke_harms_no_other(
    backend: AttentionBackend, dtype: torch.dtype
) -> None:
    """Nothing of a model's NaN stays where the next sequence is computed."""
    lengths = [(80, 80), (17, 33), (1, 20), (1, 70), (1, 9)]
    problem = lay_out(Case(lengths=lengths, head_dim=64, dtype=dtype), backend)
    is_broken = torch.tensor([True, False, False, True, False])
    is_broken = is_broken.repeat_interleave(torch.tensor([count for count, _ in lengths]))
    wanted = problem.attend(backend)[~is_broken]
    for tokens in (problem.keys, problem.values):
        tokens[0].fill_(math.nan)
        tokens[3].fill_(math.nan)
    backend.write(
        problem.layer, torch.cat(problem.keys), torch.cat(problem.values), problem.old_slots
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        output = problem.attend(backend)
    finally:
        torch.set_num_threads(threads)
    assert output[is_broken].isnan().all()
    assert torch.equal(output[~is_broken], wanted)


def test_only_the_given_slots_are_written(backend: AttentionBackend) -> None:
    problem = lay_out(Case(lengths=[(1, 21), (5, 40)]), backend)
    for pool, tokens in (
        (problem.layer.key, problem.keys),
        (problem.layer.value, problem.values),
    ):
        flat = pool.flatten(0, 1)
        assert torch.equal(flat[problem.old_slots], torch.cat(tokens))
        is_old = torch.ones(len(flat), dtype=torch.bool)
        is_old[problem.old_slots] = False
        assert flat[is_old].isnan().all()


def test_queries_and_keys_may_be_strided(backend: AttentionBackend) -> None:
    """As they come from a model: heads before tokens."""
    problem = lay_out(Case(lengths=[(1, 20), (9, 30)]), backend)
    wanted = problem.attend(backend)
    query = torch.cat(problem.queries)
    heads_first = query.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(problem.attend(backend, heads_first), wanted)
    keys, values = (
        torch.cat(tokens).permute(2, 1, 0).contiguous().permute(2, 1, 0)
        for tokens in (problem.keys, problem.values)
    )
    assert keys.stride(-1) != 1
    other = KVLayer(torch.zeros_like(problem.layer.key), torch.zeros_like(problem.layer.value))
    backend.write(other, keys, values, problem.old_slots)
    assert torch.equal(replace(problem, layer=other).attend(backend), wanted)


@pytest.mark.parametrize("head_dim", [40, 48, 64])
@pytest.mark.parametrize("dtype", RELATIVE_TOLERANCE)
def test_a_sequence_does_not_feel_the_batch_nor_the_threads(
    backend: AttentionBackend, dtype: torch.dtype, head_dim: int
) -> None:
    lengths = [(1, 3000), (40, 90), (1, 50), (64, 64), (1, 300)]
    problem = lay_out(Case(lengths=lengths, head_dim=head_dim, dtype=dtype), backend)
    together = problem.attend(backend)
    starts = problem.batch.query_start.tolist()
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        for i, (query_len, kv_len) in enumerate(lengths):
            batch = replace(
                problem.batch,
                query_start=torch.tensor([0, query_len], dtype=torch.int32),
                kv_lens=torch.tensor([kv_len], dtype=torch.int32),
                block_tables=problem.batch.block_tables[i : i + 1],
            )
            alone = replace(problem, batch=batch).attend(backend, problem.queries[i])
            assert torch.equal(alone, together[starts[i] : starts[i + 1]])
    finally:
        torch.set_num_threads(threads)


def test_the_kernel_refuses_what_lies_outside_its_memory() -> None:
    kernel = BACKENDS["cpu"]
    problem = lay_out(Case(lengths=[(1, 40)]), kernel)
    for wrong in (-1, 999):
        tables = problem.batch.block_tables.clone()
        tables[0, 1] = wrong
        with pytest.raises(RuntimeError, match=r"block .* does not exist"):
            replace(problem, batch=replace(problem.batch, block_tables=tables)).attend(kernel)
        with pytest.raises(RuntimeError, match="slot"):
            kernel.write(
                problem.layer, problem.keys[0][:1], problem.values[0][:1], torch.tensor([wrong])
            )
    too_long = replace(problem.batch, kv_lens=torch.tensor([49], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="room for 48"):
        replace(problem, batch=too_long).attend(kernel)
    with pytest.raises(RuntimeError, match="one dtype"):
        problem.attend(kernel, torch.cat(problem.queries).double().bfloat16())


def test_the_registry_names_its_backends() -> None:
    assert {name: one.name for name, one in BACKENDS.items()} == {name: name for name in BACKENDS}


def test_the_best_backend_that_serves_is_taken() -> None:
    assert select_backend(CPU, torch.bfloat16) is BACKENDS["cpu"]
    assert select_backend(CPU, torch.float64) is BACKENDS["reference"]
    with pytest.raises(ValueError, match="int8 on cpu"):
        select_backend(CPU, torch.int8)


def test_without_a_compiler_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SHARDLINE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    load_kernel.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert select_backend(CPU, torch.float32) is BACKENDS["reference"]
            assert select_backend(CPU, torch.bfloat16) is BACKENDS["reference"]
        # Where CUDA's compiler is installed, torch says something of its own at its first import.
        (record,) = [record for record in caplog.records if record.name.startswith("shardline")]
        assert "no-such-compiler" in record.message
        assert "apt install g++" in record.message
    finally:
        load_kernel.cache_clear()


def test_kv_memory_is_zero_and_as_large_as_it_says() -> None:
    shape = KVShape(block_size=16, num_kv_heads=3, head_dim=8, dtype=torch.bfloat16)
    layers = allocate_kv(range(4, 6), 10, shape, CPU)
    assert list(layers) == [4, 5]
    for layer in layers.values():
        assert layer.key.shape == layer.value.shape == (10, 16, 3, 8)
        assert layer.key.nbytes + layer.value.nbytes == 10 * shape.block_bytes
        assert not layer.key.any() and not layer.value.any()


def test_a_block_of_all_layers_lies_together() -> None:
    """So that a new block touches memory of its own size, however many layers there are."""
    shape = KVShape(block_size=16, num_kv_heads=3, head_dim=8, dtype=torch.bfloat16)
    layers = allocate_kv(range(5), 10, shape, CPU)
    parts = [part[7] for layer in layers.values() for part in (layer.key, layer.value)]
    starts = sorted(part.data_ptr() for part in parts)
    assert starts == [starts[0] + i * shape.block_bytes // 2 for i in range(10)]
