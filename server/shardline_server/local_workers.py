"""The worker processes of one node: started with their share of its cores and memory, and ended."""

import os
import subprocess
from collections.abc import Sequence

import msgspec

from shardline_server.child import (
    describe_exit,
    start_child_process,
    stop_child_processes,
    was_killed,
)
from shardline_shards.layout import Place, deal
from shardline_shards.messages import WorkerConfig

_CPU_MEMORY_SHARE = 0.5
_CUDA_MEMORY_SHARE = 0.9


class LocalWorkers:
    """Processes by place; all of them children of this process."""

    def __init__(self) -> None:
        self._processes: dict[Place, subprocess.Popen[bytes]] = {}

    def start(self, configs: Sequence[WorkerConfig], threads_per_worker: int | None) -> None:
        """Start one process for each config; cores and free memory are dealt out among them."""
        for config, cpu_ids in zip(configs, _deal_cores(len(configs)), strict=True):
            num_threads = threads_per_worker or max(1, len(cpu_ids))
            is_cuda = config.device == "cuda"
            share = _CUDA_MEMORY_SHARE if is_cuda else _CPU_MEMORY_SHARE / len(configs)
            own = msgspec.structs.replace(
                config,
                parent_pid=os.getpid(),
                free_memory_share=share,
                num_threads=num_threads,
                cpu_ids=cpu_ids,
            )
            self._processes[config.place] = start_child_process(
                "shardline_shards.worker_process", own, environment=_thread_environment(num_threads)
            )

    def find_ended(self) -> str | None:
        """A worker that has ended, and how; None while all are alive."""
        for place, process in self._processes.items():
            if process.poll() is not None:
                return f"the worker of {place} {describe_exit(process.returncode)}"
        return None

    def find_killed(self, *, besides: Place, within_s: float) -> str | None:
        """A worker other than `besides` that a signal has ended, or ends within that time each."""
        for place, process in self._processes.items():
            if place != besides and was_killed(process, within_s):
                return f"the worker of {place} {describe_exit(process.returncode)}"
        return None

    def join(self) -> None:
        """Wait for workers that were told to stop; end those that do not."""
        stop_child_processes(list(self._processes.values()))

    def kill(self) -> None:
        """End all at once."""
        for process in self._processes.values():
            process.kill()
        self.join()


def _thread_environment(num_threads: int) -> dict[str, str]:
    """Variables that the OpenMP library reads when it is loaded.

    By default its idle threads spin. Engine and front end need those cores: with one more busy
    process beside it, a spinning worker was five to twenty times slower than a waiting one.
    """
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def _deal_cores(num_workers: int) -> list[tuple[int, ...]]:
    """This node's cores, dealt out; nobody is pinned where there are fewer cores than workers."""
    if not hasattr(os, "sched_getaffinity"):
        return [()] * num_workers
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < num_workers:
        return [()] * num_workers
    return [tuple(cores[i] for i in part) for part in deal(len(cores), num_workers)]
