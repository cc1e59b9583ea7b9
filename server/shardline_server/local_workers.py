"""The worker processes of one node: started with their share of its cores and memory, and ended."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from shardline_server.child import (
    configure_child_process,
    describe_exit,
    prepare_child_process,
    stop_child_processes,
)
from shardline_shards.layout import Place, deal
from shardline_shards.messages import WorkerConfig

_CPU_MEMORY_SHARE = 0.5
_CUDA_MEMORY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Death:
    """A worker process that has ended, and how."""

    place: Place
    how: str

    def __str__(self) -> str:
        return f"the worker of {self.place} {self.how}"


class LocalWorkers:
    """Processes by place; all of them children of this process."""

    def __init__(self) -> None:
        self._processes: dict[Place, subprocess.Popen[bytes]] = {}
        self._configs: dict[Place, WorkerConfig] = {}
        self._spare: subprocess.Popen[bytes] | None = None

    def start(self, configs: Sequence[WorkerConfig], threads_per_worker: int | None) -> None:
        """Start one process for each config; cores and free memory are dealt out among them."""
        for config, cpu_ids in zip(configs, deal_cores(len(configs)), strict=True):
            is_cuda = config.device == "cuda"
            share = _CUDA_MEMORY_SHARE if is_cuda else _CPU_MEMORY_SHARE / len(configs)
            self._configs[config.place] = msgspec.structs.replace(
                config,
                free_memory_share=share,
                num_threads=threads_per_worker or max(1, len(cpu_ids)),
                cpu_ids=cpu_ids,
            )
            self._start(self._configs[config.place])

    def restart(self, places: Sequence[Place], generation: int) -> None:
        """Start those workers anew, with the cores that they had; what is left of them is ended.

        The first one takes the spare process, if there is one.
        """
        for place in places:
            self._processes[place].kill()
        stop_child_processes([self._processes[place] for place in places])
        for place in places:
            self._start(msgspec.structs.replace(self._configs[place], generation=generation))

    def keep_spare(self) -> None:
        """See that a process is there that has imported torch, to take a dead worker's place.

        With the threads that the first worker has; a worker sets its own when it is configured.
        """
        if self._spare is None or self._spare.poll() is not None:
            num_threads = next(iter(self._configs.values())).num_threads
            self._spare = _prepare(num_threads)

    def ended(self) -> list[Death]:
        """The workers that have ended."""
        return [
            Death(place, describe_exit(process.returncode))
            for place, process in self._processes.items()
            if process.poll() is not None
        ]

    def join(self) -> None:
        """Wait for workers that were told to stop; end those that do not."""
        processes = list(self._processes.values())
        if self._spare is not None:
            self._spare.kill()
            processes.append(self._spare)
        stop_child_processes(processes)

    def kill(self) -> None:
        """End all at once."""
        for process in self._processes.values():
            process.kill()
        self.join()

    def _start(self, config: WorkerConfig) -> None:
        spare, self._spare = self._spare, None
        is_alive = spare is not None and spare.poll() is None
        process = spare if spare and is_alive else _prepare(config.num_threads)
        configure_child_process(process, config)
        self._processes[config.place] = process


def _prepare(num_threads: int) -> subprocess.Popen[bytes]:
    return prepare_child_process(
        "shardline_shards.worker_process",
        str(os.getpid()),
        environment=thread_environment(num_threads),
    )


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
