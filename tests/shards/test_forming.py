"""Ranks that cannot meet, because one has died meanwhile."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardline_shards import mesh, nccl
from shardline_shards.communicators import Communicators
from shardline_shards.errors import LostPeer
from shardline_shards.layout import ParallelLayout
from shardline_shards.ledger import Ledger
from tests.shards.ranks import KINDS, RankPool, meet, unformed

LAYOUT = ParallelLayout(tp=1, stage_layers=(1, 1))
LIMIT_S = 1.0


TOLD = {
    "mesh": "nothing has come from stage 1, tp rank 0 for 1 s",
    "groups": "the process groups cannot be formed",
}


def come(store: dist.Store, rank: int, kind: str) -> Any:
    """Rank 1 is there the second time only; a limit that is shorter than in earnest holds for who
    waits, and a step may take longer.
    """
    own = unformed(store, LAYOUT, rank, Ledger.create(), kind)
    told = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "_FORM_LIMIT_S", LIMIT_S)
        if rank == 0:
            told = _wait_in_vain(own)
        meet(own, store, rank, generation=1)
    return told, _wait_longer_than_the_limit(own)


def _wait_in_vain(own: Communicators) -> str:
    address = own.open(0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(LostPeer) as caught:
        patch.setattr(nccl, "_STEP_LIMIT", timedelta(seconds=LIMIT_S))
        own.form([address, address])  # it meets itself there, which is not the one it waits for
    own.abandon()
    return str(caught.value)


def _wait_longer_than_the_limit(own: Communicators) -> list[list[float]]:
    hidden = torch.tensor([[1.0, 2.0]])
    if own.next is not None:
        time.sleep(2 * LIMIT_S)  # this is the slowness that the other rank has to bear
        own.next.send(hidden)
    else:
        assert own.previous is not None
        hidden = own.previous.begin_receive(1, 2, torch.float32)()
    own.close()
    return hidden.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_who_meets_nobody_says_so_and_may_meet_others_later(ranks: RankPool, kind: str) -> None:
    answers = ranks.call(come, 2, kind)
    told, nothing = [told for told, _ in answers]
    assert told.startswith(TOLD[kind]) and nothing is None
    assert [hidden for _, hidden in answers] == [[[1.0, 2.0]]] * 2
