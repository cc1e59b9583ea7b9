"""Entry point of a worker process: `python -m shardline_shards.worker_process PARENT_PID LEDGER`.

The second is the descriptor of its ledger, inherited. Takes a `WorkerConfig` as JSON on standard
input, and may be given it long after it was started. Kept apart from the worker because importing
torch takes seconds: a process must be tied to its parent before that, and one that has it behind it
can take a dead worker's place at once.
"""

import os
import sys

import msgspec

from shardline_shards.ledger import Ledger
from shardline_shards.messages import WorkerConfig
from shardline_shards.process import name_process, start_child


def main() -> None:
    """Tie this process to its parent, import torch, then be the worker that one asks for."""
    start_child("worker", parent_pid=int(sys.argv[1]))
    from shardline_shards.worker import run_worker

    line = sys.stdin.buffer.readline()
    if not line:
        os._exit(0)  # a spare that was never needed
    config = msgspec.json.decode(line, type=WorkerConfig)
    place = config.place
    name_process(f"worker stage={place.stage_index} tp={place.tp_rank}")
    status = run_worker(config, Ledger(int(sys.argv[2])))
    os._exit(status)  # not sys.exit: taking torch down in order costs seconds


if __name__ == "__main__":
    main()
