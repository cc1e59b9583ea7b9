"""What every child process does first: a name, an end with its parent, its own cores."""

import ctypes
import os
import signal
import sys
import threading
import time

import setproctitle

LEFT_TO_PARENT = (signal.SIGINT, signal.SIGTERM)

_PR_SET_PDEATHSIG = 1


def start_child(name: str, parent_pid: int) -> None:
    """Name this process for `ps` and make it end when its parent does, however that ends.

    Ctrl-C reaches a whole foreground group, and SIGTERM often does; children leave it to their
    parent to stop them, since it may have use for them until the last request is done. The parent
    starts us with these signals blocked: what has come since is forgotten.
    """
    name_process(name)
    for number in LEFT_TO_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_PARENT)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)
    else:
        threading.Thread(target=_watch_parent, args=(parent_pid,), daemon=True).start()


def name_process(name: str) -> None:
    """What `ps` calls this process."""
    setproctitle.setproctitle(f"shardline: {name}")


def _watch_parent(parent_pid: int) -> None:
    """Systems other than Linux do not signal a parent's death: look for it."""
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)


def pin_to(cpu_ids: tuple[int, ...]) -> None:
    """Run this process on these cores only, where the system can do that; none: on any."""
    if cpu_ids and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpu_ids)
