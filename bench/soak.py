"""Does a server that is always full grow? Memory, descriptors and threads of each of its processes.

    python bench/soak.py demo --minutes 30 --png soak.png

Options that it does not know go to the server. Starts `shardline serve` in two stages and keeps 16
streams under way through each door for so long, with prompts of 16 to 512 tokens and answers of 8
to 128. Every five seconds it looks at each process. What the first part is for (`--settle`, five
minutes) is not counted: caches fill, and KV memory is written to for the first time. A minute's
median from its end is then compared with that of the last minute. The status is 1 if a process
came or went, memory grew by 1 % or more, descriptors or threads are more, or a request failed.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from machine import machine_facts
from servers import leave_on_sigterm
from serving import serving
from tables import markdown

INTERVAL_S = 5.0
WINDOW_S = 60.0
GROWTH_LIMIT = 0.01
LOAD = ["--ignore-eos", "--concurrency", "16", "--prompt-tokens", "16:512"]
LOAD += ["--output-tokens", "8:128"]


@dataclass(frozen=True)
class Sample:
    """A process at one time: seconds since the start, resident bytes, open files, threads."""

    at_s: float
    rss: int
    num_fds: int
    num_threads: int


Samples = dict[str, list[Sample]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_load(url: str, seconds: float, report: Path) -> subprocess.Popen[bytes]:
    """`shardline bench` in the background; its prompts differ from those of any other."""
    command = [sys.executable, "-m", "shardline_server", "bench", url, *LOAD]
    command += ["--duration", str(seconds), "--json", str(report)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def find_server(url: str) -> psutil.Process:
    """The process that listens at `url`."""
    port = int(url.rpartition(":")[2])
    for child in psutil.Process().children():
        if any(found.laddr.port == port for found in child.net_connections()):
            return child
    raise RuntimeError(f"no child of this process listens at {url}")


def take_samples(server: psutil.Process, start_s: float, samples: Samples) -> None:
    at_s = time.monotonic() - start_s
    for process in (server, *server.children(recursive=True)):
        with process.oneshot():
            title = " ".join(process.cmdline()).strip()
            name = title if title.startswith("shardline: ") else "front end"
            sample = Sample(
                at_s, process.memory_info().rss, process.num_fds(), process.num_threads()
            )
        samples[f"{name} ({process.pid})"].append(sample)


def watch(server: psutil.Process, loads: list[subprocess.Popen[bytes]]) -> Samples:
    """Sample until the loads are over."""
    start_s = time.monotonic()
    samples: Samples = defaultdict(list)
    while all(load.poll() is None for load in loads):
        take_samples(server, start_s, samples)
        time.sleep(INTERVAL_S)
    return samples


def compare(samples: Samples, settle_s: float) -> tuple[list[list[str]], list[str]]:
    """A row for each process, and what is wrong."""
    end_s = max(one[-1].at_s for one in samples.values())
    rows, wrong = [], []
    for name, of_process in samples.items():
        first = [s for s in of_process if settle_s <= s.at_s < settle_s + WINDOW_S]
        last = [s for s in of_process if s.at_s > end_s - WINDOW_S]
        if not first or not last or of_process[0].at_s > settle_s:
            wrong.append(f"{name} was not there all the time")
            continue
        before, after = (median(s.rss for s in part) for part in (first, last))
        growth = after / before - 1
        if growth >= GROWTH_LIMIT:
            wrong.append(f"{name} grew by {growth:.1%}")
        cells = []
        for what in ("num_fds", "num_threads"):
            then, now = (median(getattr(s, what) for s in part) for part in (first, last))
            cells.append(f"{then:g} → {now:g}")
            if now > then:
                wrong.append(f"{name}: {what} went from {then:g} to {now:g}")
        rows.append(
            [name, f"{before / 2**20:.1f}", f"{after / 2**20:.1f}", f"{growth:+.2%}", *cells]
        )
    return rows, wrong


def draw(samples: Samples, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="minutes", ylabel="resident MiB")
    for name, of_process in samples.items():
        minutes = [sample.at_s / 60 for sample in of_process]
        axes.plot(minutes, [sample.rss / 2**20 for sample in of_process], label=name)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layout", default="1x2")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--settle", type=float, default=5.0, help="minutes that do not count")
    parser.add_argument("--png", type=Path)
    arguments, options = parser.parse_known_args()
    leave_on_sigterm()
    grpc_port = free_port()
    options = ["--kv-memory", "512MiB", *options, "--grpc-port", str(grpc_port)]
    with (
        serving(arguments.model, arguments.layout, options) as (url, _),
        tempfile.TemporaryDirectory() as folder,
    ):
        reports = [Path(folder) / name for name in ("http.json", "grpc.json")]
        urls = (url, f"grpc://127.0.0.1:{grpc_port}")
        seconds = arguments.minutes * 60
        loads = [start_load(at, seconds, to) for at, to in zip(urls, reports, strict=True)]
        samples = watch(find_server(url), loads)
        statuses = [load.wait() for load in loads]
        rows, wrong = compare(samples, arguments.settle * 60)
        wrong += [
            f"the load through {at} failed" for at, s in zip(urls, statuses, strict=True) if s
        ]
        for at, report in zip(urls, reports, strict=True):
            (point,) = json.loads(report.read_text())["points"]
            summary = point["summary"]
            lost = sum(summary[f"num_{kind}"] for kind in ("failed", "refused", "expired"))
            print(f"{at}: {summary['num_ok']} requests served, {lost} not")
            wrong += [f"{lost} requests through {at} were not served"] if lost else []
    print("; ".join(f"{name}: {value}" for name, value in machine_facts().items()))
    print(markdown(["process", "MiB then", "at the end", "growth", "descriptors", "threads"], rows))
    if arguments.png:
        draw(samples, arguments.png)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
