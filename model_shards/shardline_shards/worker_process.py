"""Entry point of a worker: `python -m shardline_shards.worker_process PARENT LEDGER [spare]`.

PARENT is a process id, LEDGER the descriptor of its ledger, inherited. Takes a `WorkerConfig` as
JSON on standard input, and may be given it long after it was started. Kept apart from the worker
because importing torch takes seconds: a process must be tied to its parent before that, and one
that has it behind it can take a dead worker's place at once.
"""

import importlib
import os
import sys
from threading import Thread

import msgspec

from shardline_shards.ledger import Ledger
from shardline_shards.messages import WorkerConfig
from shardline_shards.process import name_process, start_child


def main() -> None:
    """Tie this process to its parent, import torch, then be the worker that one asks for."""
    start_child("worker", parent_pid=int(sys.argv[1]))
    ledger = Ledger(int(sys.argv[2]))
    if sys.argv[3:] == ["spare"]:
        _import_in_idle_time()
        ledger.rest()  # says that it is ready
    from shardline_shards.worker import run_worker

    line = sys.stdin.buffer.readline()
    if not line:
        os._exit(0)  # a spare that was never needed
    config = msgspec.json.decode(line, type=WorkerConfig)
    place = config.place
    name_process(f"worker stage={place.stage_index} tp={place.tp_rank}")
    status = run_worker(config, ledger)
    os._exit(status)  # not sys.exit: taking torch down in order costs seconds


def _import_in_idle_time() -> None:
    """Import what a worker needs on cores that nobody else wants: those who serve are not to wait
    for two seconds of a core's work that may never be needed.

    On a thread of its own, since a process that has stepped back may not step forward again.
    """
    thread = Thread(target=_import_last)
    thread.start()
    thread.join()


def _import_last() -> None:
    if hasattr(os, "SCHED_IDLE"):  # of this thread only
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    importlib.import_module("shardline_shards.worker")


if __name__ == "__main__":
    main()
