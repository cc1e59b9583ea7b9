"""The way from one stage to the next: who sends does not wait for who still computes."""

from datetime import timedelta

import pytest
import torch
from torch import Tensor
from torch.distributed import Store

from shardline_shards.layout import ParallelLayout
from shardline_shards.ledger import Ledger
from tests.shards.ranks import KINDS, RankPool, formed

# More than what the sockets between two processes hold.
NUM_TOKENS, WIDTH, NUM_STEPS = 2048, 2048, 4


def states(step: int) -> Tensor:
    return torch.full((NUM_TOKENS, WIDTH), float(step))


def run_stage(store: Store, rank: int, kind: str) -> list[float]:
    """Stage 0 hands on all it may, and only then lets stage 1 begin to receive."""
    ledger = Ledger.create()
    communicators = formed(store, ParallelLayout(tp=1, stage_layers=(1, 1)), rank, ledger, kind)
    received: list[float] = []
    if communicators.next is not None:
        for step in range(NUM_STEPS):
            communicators.next.send(states(step))
        store.set("all are sent", "yes")
    else:
        assert communicators.previous is not None
        store.wait(["all are sent"], timedelta(seconds=30))
        for _ in range(NUM_STEPS):
            got = communicators.previous.begin_receive(NUM_TOKENS, WIDTH, torch.float32)()
            assert bool((got == got[0, 0]).all())
            received.append(float(got[0, 0]))
    communicators.close()
    ledger.close()
    return received


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_that_sends_does_not_wait_for_the_next_one(ranks: RankPool, kind: str) -> None:
    assert ranks.call(run_stage, 2, kind) == [[], [0.0, 1.0, 2.0, 3.0]]
