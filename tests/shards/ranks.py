"""Four rank processes that stay up for a session: real connections, no start-up costs."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch
from torch.distributed import Store

from shardline_shards.channel import ClientKeys
from shardline_shards.communicators import Communicators
from shardline_shards.gate import LaunchKeys
from shardline_shards.layout import ParallelLayout
from shardline_shards.ledger import Ledger
from shardline_shards.mesh_communicators import MeshCommunicators
from shardline_shards.nccl import GroupCommunicators
from shardline_shards.store import host_store, join_store

MAX_RANKS = 4
HOST = "127.0.0.1"
CPU = torch.device("cpu")
# Those of GPUs run over another backend here.
KINDS = ("mesh", "groups")


def unformed(
    store: Store,
    layout: ParallelLayout,
    rank: int,
    ledger: Ledger,
    kind: str = "mesh",
    *,
    shares_drawn: bool = False,
) -> Communicators:
    """A rank's communicators, before it has met anybody."""
    place = layout.place(rank)
    if kind == "groups":
        return GroupCommunicators(
            layout, place, ledger, HOST, CPU, backend="gloo", shares_drawn=shares_drawn
        )
    if rank == 0:
        store.set("keys", msgspec.json.encode(LaunchKeys.create().client).decode())
    keys = msgspec.json.decode(store.get("keys"), type=ClientKeys)
    return MeshCommunicators(layout, place, ledger, HOST, keys, shares_drawn=shares_drawn)


def meet(own: Communicators, store: Store, rank: int, generation: int = 0) -> None:
    """Form them; all other ranks do the same."""
    store.set(f"address/{generation}/{rank}", own.open(generation) or "none")
    addresses = [
        store.get(f"address/{generation}/{other}").decode()
        for other in range(own.layout.world_size)
    ]
    own.form([None if address == "none" else address for address in addresses])


def formed(
    store: Store, layout: ParallelLayout, rank: int, ledger: Ledger, kind: str = "mesh"
) -> Communicators:
    """A rank's communicators, when all have met."""
    own = unformed(store, layout, rank, ledger, kind)
    meet(own, store, rank)
    return own


class RankPool:
    """Calls `function(store, rank, *args)` in the first `world_size` processes at the same time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(MAX_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], world_size: int, *args: object) -> list[Any]:
        """What each rank returned; the first error of a rank is raised here."""
        store = host_store(HOST, world_size)
        pipes = self._pipes[:world_size]
        for pipe in pipes:
            pipe.send((function, store.port, world_size, args))
        answers = [pipe.recv() for pipe in pipes]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        function, port, world_size, args = job
        try:
            pipe.send(function(join_store(HOST, port, world_size), rank, *args))
        except BaseException as error:
            pipe.send(error)
