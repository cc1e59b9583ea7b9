"""The worker processes of one node: started with their share of its cores and memory, and ended."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import psutil
from msgspec import Struct

from shardline_server.child import (
    configure_child_process,
    describe_exit,
    prepare_child_process,
    stop_child_processes,
)
from shardline_server.wires import Wires
from shardline_shards.layout import Place, deal
from shardline_shards.ledger import Entry, Ledger
from shardline_shards.messages import FromWorker, WorkerConfig, worker_name
from shardline_shards.wire import Wire, wire_pair

_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
_CPU_MEMORY_SHARE = 0.5
_CUDA_MEMORY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Death:
    """A worker process that has ended, how, what it was doing, and on which other node."""

    place: Place
    how: str
    entry: Entry | None
    node: str | None = None

    def __str__(self) -> str:
        doing = "before its first step" if self.entry is None else str(self.entry)
        where = "" if self.node is None else f" on node {self.node}"
        return f"the worker of {self.place}{where} {self.how}, {doing}"

    @property
    def step_id(self) -> int | None:
        """The step that it died in, if it was in one."""
        return self.entry.step_id if self.entry is not None and self.entry.is_running else None


class WorkerState(Struct, frozen=True):
    """What a node tells of one of its workers. `how` it ended is None of one that lives; `done`
    are checksums of its last steps.
    """

    place: Place
    generation: int
    how: str | None
    is_stopped: bool
    entry: Entry | None
    done: dict[int, tuple[int, int]] = {}

    def checksums(self, step_id: int) -> tuple[int, int] | None:
        """As `Ledger.checksums`."""
        return self.done.get(step_id)


class _WorkerProcess:
    """A child with a ledger and a wire to us; until it is configured it takes no place.

    `wire` is None once taken; `wire_descriptor` is what its other end is called in the child.
    """

    def __init__(self, num_threads: int, *, is_spare: bool = False) -> None:
        self.ledger = Ledger.create()
        wire, theirs = wire_pair()
        self.wire: Wire | None = wire
        self.wire_descriptor = theirs.fileno()
        self.process = prepare_child_process(
            "shardline_shards.worker_process",
            str(os.getpid()),
            str(self.ledger.descriptor),
            *["spare"] * is_spare,
            environment=thread_environment(num_threads),
            descriptors=(self.ledger.descriptor, self.wire_descriptor),
        )
        theirs.close()

    def take_wire(self) -> Wire:
        """Our end, which from now on is closed by whoever takes it."""
        assert self.wire is not None
        wire, self.wire = self.wire, None
        return wire

    def close(self) -> None:
        """Leave a process that has ended."""
        self.ledger.close()
        if self.wire is not None:
            self.wire.close()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether it has imported all that a worker needs; said by spare ones alone."""
        return self.ledger.read() is not None


def free_memory_share(device: str, num_workers: int) -> float:
    """The part of the memory that a worker finds free, once loaded, which it takes for KV."""
    return _CUDA_MEMORY_SHARE if device == "cuda" else _CPU_MEMORY_SHARE / num_workers


class LocalWorkers:
    """Processes by place; all of them children of this process.

    If this is the engine's own process, it speaks to them over `wires`.
    """

    def __init__(self, wires: Wires[FromWorker] | None = None) -> None:
        self._wires = wires
        self._workers: dict[Place, _WorkerProcess] = {}
        self._configs: dict[Place, WorkerConfig] = {}
        self._spare: _WorkerProcess | None = None

    def start(self, configs: Sequence[WorkerConfig], threads_per_worker: int | None) -> None:
        """Start one process for each config; cores and free memory are dealt out among them."""
        for config, cpu_ids in zip(configs, deal_cores(len(configs)), strict=True):
            share = free_memory_share(config.device, len(configs))
            self._configs[config.place] = msgspec.structs.replace(
                config,
                free_memory_share=share,
                num_threads=threads_per_worker or max(1, len(cpu_ids)),
                cpu_ids=cpu_ids,
            )
            self._start(self._configs[config.place])

    def restart(self, places: Sequence[Place], generation: int) -> None:
        """Start those workers anew, as far as they are here, with the cores that they had; what is
        left of them is ended.

        The first one takes the spare process, if one is ready.
        """
        ours = [place for place in places if place in self._workers]
        for place in ours:
            self._workers[place].process.kill()
        _end([self._workers[place] for place in ours])
        for place in ours:
            config = msgspec.structs.replace(self._configs[place], generation=generation)
            self._configs[place] = config
            self._start(config)

    def keep_spare(self) -> None:
        """See that a process is there that has imported torch, to take a dead worker's place.

        With the threads that the first worker has; a worker sets its own when it is configured.
        """
        if self._spare is not None and not self._spare.is_alive:
            self._end_spare()
        if self._spare is None:
            num_threads = next(iter(self._configs.values())).num_threads
            self._spare = _WorkerProcess(num_threads, is_spare=True)

    def ended(self) -> list[Death]:
        """The workers that have ended."""
        return [
            Death(place, describe_exit(worker.process.returncode), worker.ledger.read())
            for place, worker in self._workers.items()
            if not worker.is_alive
        ]

    def states(self) -> list[WorkerState]:
        """Of every worker."""
        how = {death.place: death.how for death in self.ended()}
        stopped = self.find_stopped()
        return [
            WorkerState(
                place,
                self._configs[place].generation,
                how.get(place),
                place in stopped,
                worker.ledger.read(),
                worker.ledger.lately_done(),
            )
            for place, worker in self._workers.items()
        ]

    @property
    def ledgers(self) -> dict[Place, Ledger]:
        """What every worker here is doing."""
        return {place: worker.ledger for place, worker in self._workers.items()}

    def find_stopped(self) -> list[Place]:
        """Workers whose process is stopped, as by SIGSTOP or a debugger."""
        return [
            place
            for place, worker in self._workers.items()
            if worker.is_alive and psutil.Process(worker.process.pid).status() in _STOPPED
        ]

    def join(self) -> None:
        """Wait for workers that were told to stop; end those that do not. None is left then."""
        self._end_spare()
        _end(list(self._workers.values()))
        self._workers.clear()

    def kill(self) -> None:
        """End all at once."""
        self.hurry()
        self.join()

    def hurry(self) -> None:
        """End all at once, without taking note of it: who waits for them has to wait no longer."""
        for worker in self._workers.values():
            worker.process.kill()

    def _start(self, config: WorkerConfig) -> None:
        worker = self._take_spare() or _WorkerProcess(config.num_threads)
        if self._wires is not None:
            name = worker_name(config.layout.rank(config.place), config.generation)
            self._wires.add(name, worker.take_wire())
            config = msgspec.structs.replace(config, wire=worker.wire_descriptor)
        configure_child_process(worker.process, config)
        self._workers[config.place] = worker

    def _take_spare(self) -> _WorkerProcess | None:
        """One that still imports is ended: it does so in idle time alone, and a busy machine may
        have none for minutes.
        """
        if self._spare is not None and not self._spare.is_ready:
            self._end_spare()
        spare, self._spare = self._spare, None
        return spare

    def _end_spare(self) -> None:
        if self._spare is not None:
            self._spare.process.kill()
            _end([self._spare])
            self._spare = None


def _end(workers: Sequence[_WorkerProcess]) -> None:
    stop_child_processes([worker.process for worker in workers])
    for worker in workers:
        worker.close()


def thread_environment(num_threads: int) -> dict[str, str]:
    """Variables that the OpenMP library reads when it is loaded.

    By default its idle threads spin. Engine and front end need those cores: with one more busy
    process beside it, a spinning worker was five to twenty times slower than a waiting one.
    """
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def deal_cores(num_workers: int) -> list[tuple[int, ...]]:
    """This node's cores, dealt out; nobody is pinned where there are fewer cores than workers."""
    if not hasattr(os, "sched_getaffinity"):
        return [()] * num_workers
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < num_workers:
        return [()] * num_workers
    return [tuple(cores[i] for i in part) for part in deal(len(cores), num_workers)]
