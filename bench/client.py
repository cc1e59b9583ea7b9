"""Runs `shardline bench`, and reads what it measured."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def bench(url: str, options: list[str]) -> dict[str, Any]:
    """Its JSON without the single requests. Raises RuntimeError with what it said if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "run.json"
        command = [sys.executable, "-m", "shardline_server", "bench", url, "--ignore-eos"]
        command += [*options, "--json", str(report)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"shardline bench {' '.join(options)}: {done.stderr}{done.stdout}")
        measured: dict[str, Any] = json.loads(report.read_text())
    del measured["requests"]
    return measured
