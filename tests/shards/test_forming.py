"""Groups that cannot be formed, because a rank has died meanwhile."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardline_shards import distributed
from shardline_shards.distributed import Communicators
from shardline_shards.errors import LostPeer
from shardline_shards.layout import ParallelLayout
from shardline_shards.ledger import Ledger
from tests.shards.ranks import HOST, RankPool

LAYOUT = ParallelLayout(tp=1, stage_layers=(1, 1))
LIMIT_S = 1.0


def meet(store: dist.Store, rank: int, who_comes: tuple[int, ...]) -> Any:
    """How a rank that comes gets on; with a shorter limit than in earnest."""
    own = Communicators(LAYOUT, LAYOUT.place(rank), HOST, torch.device("cpu"), Ledger.create())
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "_FORM_LIMIT", timedelta(seconds=LIMIT_S))
            if rank in who_comes:
                own.form(store)
    except LostPeer as error:
        own.abandon()
        return str(error)
    if who_comes == (0, 1):
        return _wait_longer_than_the_limit(own)
    return None


def _wait_longer_than_the_limit(own: Communicators) -> list[list[float]]:
    hidden = torch.tensor([[1.0, 2.0]])
    if own.next is not None:
        time.sleep(2 * LIMIT_S)  # this is the slowness that the other rank has to bear
        own.next.send(hidden)
    else:
        assert own.previous is not None
        hidden = own.previous.begin_receive(1, 2, torch.float32, torch.device("cpu"))()
    own.close()
    return hidden.tolist()


def test_who_meets_nobody_says_so_and_may_form_other_groups_later(ranks: RankPool) -> None:
    """In those a step may take longer than forming."""
    told, _ = ranks.call(meet, 2, (0,))
    assert "the process groups cannot be formed (wait timeout after 1000ms" in told
    assert ranks.call(meet, 2, (0, 1)) == [[[1.0, 2.0]]] * 2
