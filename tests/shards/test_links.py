"""The ways between stages: who sends does not wait for who still computes."""

from datetime import timedelta

import pytest
import torch
from torch import Tensor
from torch.distributed import Store

from shardline_shards import shared_pipe
from shardline_shards.communicators import Communicators
from shardline_shards.errors import LostPeer
from shardline_shards.layout import ParallelLayout
from shardline_shards.ledger import Ledger
from shardline_shards.mesh_link import MeshLink
from tests.shards.ranks import KINDS, RankPool, meet, unformed

# More than what the sockets between two processes hold.
NUM_TOKENS, WIDTH, NUM_STEPS = 2048, 2048, 4
WAYS = (*KINDS, "messages")  # of a mesh whose ends are on two nodes
THREE_STAGES = ParallelLayout(tp=1, stage_layers=(1, 1, 1))


def communicators(store: Store, layout: ParallelLayout, rank: int, way: str) -> Communicators:
    kind = "mesh" if way == "messages" else way
    own = unformed(store, layout, rank, Ledger.create(), kind, shares_drawn=True)
    own.link_bytes = NUM_TOKENS * WIDTH * 4
    open_memory = shared_pipe.open_memory
    if way == "messages":
        shared_pipe.open_memory = lambda ticket: -1  # as on another node, where it is not there
    meet(own, store, rank)
    shared_pipe.open_memory = open_memory
    for link in (own.previous, own.next, own.drawn):
        if isinstance(link, MeshLink):
            assert (link.pipe is None) == (way == "messages")
    return own


def states(step: int) -> Tensor:
    return torch.full((NUM_TOKENS, WIDTH), float(step))


def run_stage(store: Store, rank: int, way: str) -> list[float]:
    """Stage 0 hands on all it may, and only then lets stage 1 begin to receive."""
    own = communicators(store, ParallelLayout(tp=1, stage_layers=(1, 1)), rank, way)
    received: list[float] = []
    if own.next is not None:
        for step in range(NUM_STEPS):
            own.next.send(states(step))
        store.set("all are sent", "yes")
    else:
        assert own.previous is not None
        store.wait(["all are sent"], timedelta(seconds=30))
        for _ in range(NUM_STEPS):
            got = own.previous.begin_receive(NUM_TOKENS, WIDTH, torch.float32)()
            assert bool((got == got[0, 0]).all())
            received.append(float(got[0, 0]))
    own.close()
    own.ledger.close()
    return received


@pytest.mark.parametrize("way", WAYS)
def test_a_stage_that_sends_does_not_wait_for_the_next_one(ranks: RankPool, way: str) -> None:
    assert ranks.call(run_stage, 2, way) == [[], [0.0, 1.0, 2.0, 3.0]]


def send_tokens_back(store: Store, rank: int, way: str) -> list[list[int]] | None:
    """The last of three stages draws; the first one reads it behind hidden states of its own."""
    own = communicators(store, THREE_STAGES, rank, way)
    drawn = None if own.drawn is None else []
    if own.next is not None:
        own.next.send(torch.zeros(1, 1))
    if own.previous is not None:
        own.previous.begin_receive(1, 1, torch.float32)()
    for tokens in ([7, 1 << 40], [3]):
        if drawn is not None and rank == 2:
            own.drawn.send(torch.tensor(tokens).view(-1, 1))
        elif drawn is not None:
            got = own.drawn.begin_receive(len(tokens), 1, torch.int64)()
            drawn.append(got.flatten().tolist())
    own.close()
    return drawn


@pytest.mark.parametrize("way", WAYS)
def test_tokens_find_their_way_from_the_last_stage_to_the_first(ranks: RankPool, way: str) -> None:
    assert ranks.call(send_tokens_back, 3, way) == [[[7, 1 << 40], [3]], None, []]


def wait_for_one_that_left(store: Store, rank: int, way: str) -> str:
    own = communicators(store, ParallelLayout(tp=1, stage_layers=(1, 1)), rank, way)
    message = ""
    if own.next is not None:
        own.abandon()
    else:
        try:
            own.previous.begin_receive(1, 1, torch.float32)()
        except LostPeer as error:
            message = str(error)
        own.abandon()
    return message


@pytest.mark.parametrize("way", ["mesh", "messages"])
def test_a_stage_that_leaves_ends_the_wait_of_the_next(ranks: RankPool, way: str) -> None:
    assert "stage 0, tp rank 0 broke" in ranks.call(wait_for_one_that_left, 2, way)[1]
