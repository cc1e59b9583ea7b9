"""What a measurement ran on."""

import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil


def machine_facts() -> dict[str, str]:
    """For the head of a report; the load is what others had left when it began."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "torch": version("torch"),
        "load average before": f"{os.getloadavg()[0]:.2f}",
    }
