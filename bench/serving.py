"""Starts a server of ours with whatever options a benchmark has."""

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator


@contextlib.contextmanager
def serving(model: str, layout: str, options: list[str]) -> Iterator[tuple[str, float]]:
    """A server on free ports; yields its URL and the seconds it took to be ready."""
    tp, pp = layout.split("x")
    command = [sys.executable, "-m", "shardline_server", "serve", model, "--tp", tp, "--pp", pp]
    command += ["--port", "0", "--grpc-port", "0", "--log-level", "warning", *options]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = next(
            match[0]
            for line in process.stdout
            if (match := re.search(r"http://[\d.:]+", line)) is not None
        )
        yield url, time.perf_counter() - start
    finally:
        process.terminate()
        process.communicate()
