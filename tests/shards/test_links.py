"""The way from one stage to the next: who sends does not wait for who still computes."""

from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import Store

from shardline_shards.distributed import Communicators, StageLink
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.ledger import Ledger
from tests.shards.ranks import HOST, RankPool

CPU = torch.device("cpu")
# More than what the sockets between two processes hold.
NUM_TOKENS, WIDTH = 2048, 2048


def states(step: int) -> Tensor:
    return torch.full((NUM_TOKENS, WIDTH), float(step))


def run_stage(store: Store, rank: int) -> list[float]:
    """Stage 0 hands on all it may, and only then lets stage 1 begin to receive."""
    ledger = Ledger.create()
    layout = ParallelLayout(tp=1, stage_layers=(1, 1))
    communicators = Communicators(layout, Place(rank, 0), HOST, CPU, ledger)
    communicators.form(store)
    received: list[float] = []
    if communicators.next is not None:
        for step in range(StageLink.MAX_PENDING):
            communicators.next.send(states(step))
        store.set("all are sent", "yes")
    else:
        assert communicators.previous is not None
        store.wait(["all are sent"], timedelta(seconds=30))
        for _ in range(StageLink.MAX_PENDING):
            got = communicators.previous.begin_receive(NUM_TOKENS, WIDTH, torch.float32, CPU)()
            assert bool((got == got[0, 0]).all())
            received.append(float(got[0, 0]))
    communicators.close()
    ledger.close()
    return received


def test_a_stage_that_sends_does_not_wait_for_the_next_one(ranks: RankPool) -> None:
    assert ranks.call(run_stage, 2) == [[], [0.0, 1.0, 2.0, 3.0]]
