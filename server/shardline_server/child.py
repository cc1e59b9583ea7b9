"""Starts our child processes: configuration comes on standard input, logs go to standard error."""

import os
import subprocess
import sys

import msgspec
from msgspec import Struct

KILL_AFTER_S = 2.0


def start_child_process(
    module: str, config: Struct, *, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Run `python -m module` with `config` as one line of JSON on its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | (environment or {}),
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(config) + b"\n")
    process.stdin.close()
    return process


def stop_child_processes(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait for children that were told to stop; end those that do not."""
    for process in processes:
        try:
            process.wait(KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def was_killed(process: subprocess.Popen[bytes], within_s: float) -> bool:
    """Whether a signal has ended the process, or does so within that time."""
    try:
        return process.wait(within_s) < 0
    except subprocess.TimeoutExpired:
        return False


def describe_exit(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode < 0:
        return f"was killed by signal {-returncode}"
    return f"ended with status {returncode}"
