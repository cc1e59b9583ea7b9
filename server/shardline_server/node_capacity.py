"""What this node has for workers: cores or GPUs, and the memory that is free."""

import os
import subprocess
from pathlib import Path

from shardline_server.placement import Capacity
from shardline_shards.host_memory import available_memory


def count_gpus() -> int:
    """GPUs that the driver shows; torch would take seconds to say so."""
    return len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()])


def own_capacity(device: str) -> Capacity:
    """The capacity for workers on `device`."""
    if device == "cuda":
        return Capacity(is_cuda=True, num_devices=count_gpus(), free_bytes=_smallest_gpu())
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return Capacity(is_cuda=False, num_devices=num_cores, free_bytes=available_memory())


def _smallest_gpu() -> int | None:
    """Bytes free on the GPU with the least of them; torch would take some of it to look."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    free_mib = [int(line) for line in output.split() if line.isdigit()]
    return min(free_mib) * 1024**2 if free_mib else None
