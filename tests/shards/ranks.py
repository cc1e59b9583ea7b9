"""Four rank processes that stay up for a session: real process groups, no start-up costs."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from shardline_shards.distributed import host_store, join_store

MAX_RANKS = 4
HOST = "127.0.0.1"


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
    import torch

    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        function, port, world_size, args = job
        try:
            pipe.send(function(join_store(HOST, port, world_size), rank, *args))
        except BaseException as error:
            pipe.send(error)
