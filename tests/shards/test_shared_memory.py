"""Sums and gathers through shared memory, and what ends the wait for a rank that is gone."""

import multiprocessing
import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardline_shards import shared_memory
from shardline_shards.attention.cpu import load_kernel
from shardline_shards.collectives import StageCollectives
from shardline_shards.communicators import Communicators
from shardline_shards.errors import LostPeer
from shardline_shards.layout import ParallelLayout
from shardline_shards.ledger import Ledger
from shardline_shards.node_memory import open_memory
from tests.shards.ranks import RankPool, formed

SLOT_BYTES = 1 << 22


def form(store: dist.Store, rank: int, size: int) -> tuple[Communicators, StageCollectives]:
    layout = ParallelLayout(tp=size, stage_layers=(1,))
    own = formed(store, layout, rank, Ledger.create())
    assert isinstance(own.collectives, StageCollectives)
    return own, own.collectives


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def sums(store: dist.Store, rank: int, size: int, shapes: list[tuple[int, ...]], dtype: str):
    own, stage = form(store, rank, size)
    kind = type(stage._met()).__name__
    inputs = [part(rank, shape, getattr(torch, dtype)) for shape in shapes]
    outputs = [stage.all_reduce(tensor).tolist() for tensor in inputs]
    own.close()
    return kind, outputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums_have_the_same_bits_on_every_rank(ranks: RankPool, dtype: str) -> None:
    wide = SLOT_BYTES // 2 + 3  # more than a slot holds, in every dtype
    shapes = [(1, 5), (0, 5), (2, 3, 7), (wide,), (1,)]
    answers = ranks.call(sums, 3, 3, shapes, dtype)
    assert [kind for kind, _ in answers] == ["SharedMemoryCollectives"] * 3
    for index, shape in enumerate(shapes):
        parts = [part(rank, shape, getattr(torch, dtype)).float() for rank in range(3)]
        expected = (parts[0] + parts[1] + parts[2]).to(getattr(torch, dtype)).tolist()
        assert all(outputs[index] == expected for _, outputs in answers)


def gathers(store: dist.Store, rank: int, size: int, shape: tuple[int, ...], sizes: list[int]):
    own, stage = form(store, rank, size)
    tensor = part(rank, (*shape, sizes[rank]), torch.float32)
    outputs = [stage.gather_last_dim(tensor, sizes) for _ in range(3)]
    total = stage.all_reduce(torch.ones(2))  # rounds of both kinds may follow each other
    own.close()
    return [output.tolist() for output in outputs], total.tolist()


@pytest.mark.parametrize("shape", [(4,), (0,), (1, 3), (300,)])
def test_rank_0_gathers_uneven_parts(ranks: RankPool, shape: tuple[int, ...]) -> None:
    sizes = [5000, 4999, 1]
    answers = ranks.call(gathers, 3, 3, shape, sizes)
    parts = [part(rank, (*shape, sizes[rank]), torch.float32) for rank in range(3)]
    assert answers[0] == ([torch.cat(parts, dim=-1).tolist()] * 3, [3.0, 3.0])
    assert answers[1] == ([parts[1].tolist()] * 3, [3.0, 3.0])


def waits_for_one_that_left(store: dist.Store, rank: int) -> str:
    own, stage = form(store, rank, 2)
    message = ""
    if rank == 0:
        own.abandon()
    else:
        try:
            stage.all_reduce(torch.ones(1))
        except LostPeer as error:
            message = str(error)
    own.close()
    return message


def test_a_rank_that_leaves_ends_the_wait_of_others(ranks: RankPool) -> None:
    assert "tp rank 0 does not answer" in ranks.call(waits_for_one_that_left, 2)[1]


def join_and_die(ticket: Tensor) -> None:
    load_kernel()
    torch.classes.shardline.SharedMemory(open_memory(ticket), 1, 2)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_dies_ends_the_wait_of_others() -> None:
    assert load_kernel()
    descriptor, ticket = shared_memory._create(2)
    memory = torch.classes.shardline.SharedMemory(descriptor, 0, 2)
    process = multiprocessing.get_context("spawn").Process(target=join_and_die, args=(ticket,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(RuntimeError, match="tp rank 1 does not answer"):
        memory.all_reduce(torch.ones(1))
    os.close(descriptor)


def falls_back(store: dist.Store, rank: int) -> tuple[str, list[float]]:
    open_memory = shared_memory.open_memory
    if rank == 1:
        shared_memory.open_memory = lambda ticket: (
            -1
        )  # as on another node, where the path is not there
    own, stage = form(store, rank, 2)
    shared_memory.open_memory = open_memory
    total = stage.all_reduce(torch.ones(2)).tolist()
    kind = type(stage._met()).__name__
    own.close()
    return kind, total


def test_all_ranks_exchange_messages_where_one_cannot_share(ranks: RankPool) -> None:
    assert ranks.call(falls_back, 2) == [("ExchangeCollectives", [2.0, 2.0])] * 2


def opens_with_another_token(store: dist.Store, rank: int) -> int:
    descriptor, ticket = shared_memory._create(2)
    ticket[-1] += 1
    opened = open_memory(ticket)
    os.close(descriptor)
    return opened


def test_what_only_looks_like_the_memory_is_not_opened(ranks: RankPool) -> None:
    assert ranks.call(opens_with_another_token, 1) == [-1]
