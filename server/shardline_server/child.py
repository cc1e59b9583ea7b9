"""Starts our child processes: configuration comes on standard input, logs go to standard error."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

import msgspec
from msgspec import Struct

from shardline_shards.process import LEFT_TO_PARENT

KILL_AFTER_S = 2.0


def start_child_process(
    module: str, config: Struct, *, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Run `python -m module` with `config` as one line of JSON on its standard input."""
    process = prepare_child_process(module, environment=environment)
    configure_child_process(process, config)
    return process


def prepare_child_process(
    module: str,
    *arguments: str,
    environment: dict[str, str] | None = None,
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Run `python -m module arguments…`; it inherits `descriptors`, and waits for its
    configuration. Signals to its whole group do not end it, from its first instruction on.
    """
    with _blocked(LEFT_TO_PARENT):
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | (environment or {}),
            pass_fds=descriptors,
        )


@contextlib.contextmanager
def _blocked(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """A child inherits which signals wait; ours come when we are through."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def configure_child_process(process: subprocess.Popen[bytes], config: Struct) -> None:
    """Give a prepared process its configuration; one that has died meanwhile is left to be found
    dead.
    """
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(msgspec.json.encode(config) + b"\n")
        process.stdin.close()


def stop_child_processes(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait for children that were told to stop; end those that do not."""
    for process in processes:
        try:
            process.wait(KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


class ChildExits:
    """A descriptor to poll on, readable when a child of this process has ended.

    Made in the main thread, once a process.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # an ignored signal would wake nobody

    def fileno(self) -> int:
        """The descriptor."""
        return self._reader.fileno()

    def clear(self) -> None:
        """From now on only what ends from now on makes it readable."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)


def describe_exit(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode < 0:
        return f"was killed by signal {-returncode}"
    return f"ended with status {returncode}"
