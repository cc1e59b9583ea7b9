"""How long streams pause when a worker is killed, and how soon that is known.

    python bench/recovery.py demo --layout 1x2 --streams 8

Options that it does not know go to the server. For each stage in turn, streams run, its worker is
killed (SIGKILL), and two times are taken from then on: until `/ready` is not 200 any more, and the
longest gap between two pieces of any stream. Without `--no-spare-worker` it waits until a process
is there that can take a dead worker's place, as there is a few seconds after a start.
"""

import argparse
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
from serving import serving

from shardline_client import Client

WORKER = "shardline: worker"
OPTIONS = {"max_tokens": 400, "ignore_eos": True}


def find_workers() -> dict[str, psutil.Process]:
    """This process has started one server; its workers by name, the spare one among them."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        try:
            name = " ".join(child.cmdline()).strip()
        except psutil.NoSuchProcess:
            continue
        if name.startswith(WORKER):
            found[name] = child
    return found


def wait_for_spare() -> None:
    """Until it is there, and has done what it can do beforehand: then it takes no time any more."""
    spent = None
    while (spare := find_workers().get(WORKER)) is None or spent != spare.cpu_times():
        spent = None if spare is None else spare.cpu_times()
        time.sleep(1.0)


def read_times(client: Client, seed: int, begun: threading.Barrier) -> list[float]:
    """When each piece of a stream came; it is not ended early by what happens."""
    times = []
    with client.stream_complete("The", seed=seed, **OPTIONS) as stream:
        for _ in stream:
            times.append(time.perf_counter())
            if len(times) == 20:
                begun.wait()
        assert stream.completion.finish_reason == "length"
    return times


def seconds_until_known(url: str, since: float) -> float:
    """Asks all the time whether the server is ready."""
    with httpx.Client(base_url=url) as probe:
        while probe.get("/ready").status_code == 200:
            time.sleep(0.005)
    return time.perf_counter() - since


def kill_one(url: str, name: str, num_streams: int) -> tuple[float, float]:
    """Seconds until the death is known, and of the longest pause of any stream."""
    begun = threading.Barrier(num_streams + 1)
    with Client(url, timeout_s=120) as client, ThreadPoolExecutor(num_streams) as threads:
        streams = [threads.submit(read_times, client, i, begun) for i in range(num_streams)]
        begun.wait()
        killed_at = time.perf_counter()
        find_workers()[name].kill()
        known_s = seconds_until_known(url, killed_at)
        pauses = []
        for stream in streams:
            times = [time for time in stream.result() if time > killed_at]
            gaps = [b - a for a, b in zip([killed_at, *times], times, strict=False)]
            pauses.append(max(gaps))
        return known_s, max(pauses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layout", default="1x2")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="two at most: a third death of a worker within a minute ends a server",
    )
    arguments, options = parser.parse_known_args()
    print("| killed | round | known after s | longest pause s |\n|---|---|---|---|")
    with serving(arguments.model, arguments.layout, options) as (url, _):
        names = sorted(name for name in find_workers() if name != WORKER)
        for number in range(arguments.rounds):
            for name in names:
                if "--no-spare-worker" not in options:
                    wait_for_spare()
                known_s, pause_s = kill_one(url, name, arguments.streams)
                place = name.removeprefix(WORKER).strip()
                print(f"| {place} | {number + 1} | {known_s:.2f} | {pause_s:.2f} |", flush=True)


if __name__ == "__main__":
    main()
