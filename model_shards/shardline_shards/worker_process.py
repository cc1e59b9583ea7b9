"""Entry point of a worker process: `python -m shardline_shards.worker_process`.

Takes a `WorkerConfig` as JSON on standard input. Kept apart from the worker because importing torch
takes seconds, and a process must be tied to its parent before that.
"""

import os
import sys

import msgspec

from shardline_shards.messages import WorkerConfig
from shardline_shards.process import start_child


def main() -> None:
    """Tie this process to its parent, then be a worker."""
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerConfig)
    place = config.place
    start_child(f"worker stage={place.stage_index} tp={place.tp_rank}", config.parent_pid)
    from shardline_shards.worker import run_worker

    status = run_worker(config)
    os._exit(status)  # not sys.exit: taking torch down in order costs seconds


if __name__ == "__main__":
    main()
