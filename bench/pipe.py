"""What two stages gain and where their time goes, beside one stage, for several steps in flight.

    python bench/pipe.py demo --layouts 1x1 1x2 --in-flight 2 ahead --streams 32

Options that it does not know go to the server. Starts `shardline serve` for each, sends waves of
streams that start together (256 random tokens in, 128 greedy ones out) to one after the other, and
reads from `/load` what became of the stages' time in between, but for the first second. With
`--steady SECONDS` there are always so many streams instead, with 256 ± 50 % tokens in and 64 ± 50 %
out, and the stages' time in the first and the last fifth does not count. One stage is served with 1
step in flight, and with the next one planned ahead.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
from client import bench
from serving import serving

STARTING_S = 1.0  # that the load takes to begin
PARTS = ("compute", "communication", "starved", "scheduler", "idle")


def pipe_seconds(url: str) -> list[dict[str, float]] | None:
    """Totals of each stage; None before the first step."""
    pipe = httpx.get(f"{url}/load").json()["pipe"]
    return pipe and [stage["seconds"] for stage in pipe["stages"]]


def settled_pipe_seconds(url: str) -> list[dict[str, float]]:
    """The same, once the last step has been told of."""
    before: list[float] | None = None
    while True:
        seconds = pipe_seconds(url)
        now = seconds and [stage["compute"] for stage in seconds]
        if seconds is not None and now == before:
            return seconds
        before = now
        time.sleep(0.6)  # the engine tells it twice a second


Measured = tuple[dict[str, Any], list[dict[str, float]]]


def run_wave(url: str, num_streams: int) -> Measured:
    """Streams that start together, with 256 tokens in and 128 out; the summary, and the seconds of
    each stage meanwhile.
    """
    options = ["--concurrency", str(num_streams), "--num-requests", str(num_streams)]
    options += ["--prompt-tokens", "256", "--output-tokens", "128"]
    with ThreadPoolExecutor(1) as background:
        load = background.submit(bench, url, options)
        while not load.done() and num_running(url) < min(2, num_streams):
            time.sleep(0.05)  # `shardline bench` warms up with a request by itself
        time.sleep(STARTING_S)
        before = pipe_seconds(url)
        (point,) = load.result()["points"]
    assert before is not None, "the load has not begun"
    return point["summary"], _between(before, settled_pipe_seconds(url))


def num_running(url: str) -> int:
    """Requests that the server has, those that wait aside."""
    running: int = httpx.get(f"{url}/load").json()["num_requests_running"]
    return running


def run_steadily(url: str, num_streams: int, seconds: float) -> Measured:
    """The same of so many streams at any time."""
    end_s = seconds / 5
    options = ["--concurrency", str(num_streams), "--duration", str(seconds)]
    options += ["--prompt-tokens", "128:384", "--output-tokens", "32:96"]
    with ThreadPoolExecutor(1) as background:
        load = background.submit(bench, url, options)
        time.sleep(end_s + STARTING_S)
        before = pipe_seconds(url)
        time.sleep(seconds - 2 * end_s)
        after = pipe_seconds(url)
        (point,) = load.result()["points"]
    assert before is not None and after is not None, "the load has not begun"
    return point["summary"], _between(before, after)


def _between(
    before: list[dict[str, float]], after: list[dict[str, float]]
) -> list[dict[str, float]]:
    return [
        {part: new[part] - old[part] for part in PARTS}
        for old, new in zip(before, after, strict=True)
    ]


def row(num_streams: int, measured: Measured) -> str:
    """With the shares of the time in which there was work."""
    summary, stages = measured
    shares = []
    for spent in stages:
        busy = sum(spent.values()) - spent["idle"]
        shares.append(" / ".join(f"{spent[part] / busy:.1%}" for part in PARTS[:-1]))
    latencies = " | ".join(f"{summary[kind]['mean']:.1f}" for kind in ("tpot_ms", "ttft_ms"))
    rate = f"{summary['output_tokens_per_s']:.1f}"
    return f"| {num_streams} | {rate} | {latencies} | {' ; '.join(shares)} |"


def in_flight_options(in_flight: str) -> list[str]:
    """What makes a server have so many steps in flight, or one planned ahead."""
    if in_flight == "ahead":
        return ["--async-scheduling"]
    return ["--no-async-scheduling", "--max-in-flight", in_flight]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layouts", nargs="+", default=["1x1", "1x2"])
    parser.add_argument("--in-flight", nargs="+", default=["2", "ahead"], help="of several stages")
    parser.add_argument("--streams", nargs="+", type=int, default=[32])
    parser.add_argument("--waves", type=int, default=1)
    parser.add_argument("--steady", type=float, metavar="SECONDS", help="instead of a wave")
    arguments, options = parser.parse_known_args()
    print("Stages: compute / communication / starved / scheduler, of the time with work\n")
    print("| layout | in flight | streams | tokens/s | mean TPOT ms | mean TTFT ms | stages |")
    print("|---|---|---|---|---|---|---|")
    with ExitStack() as stack:
        urls = {}
        for layout in arguments.layouts:
            for in_flight in ["1", "ahead"] if layout.endswith("x1") else arguments.in_flight:
                given = [*options, *in_flight_options(in_flight)]
                url, _ = stack.enter_context(serving(arguments.model, layout, given))
                urls[layout, in_flight] = url
                bench(url, ["--concurrency", "4", "--num-requests", "4"])
        for num_streams in arguments.streams * arguments.waves:
            for (layout, in_flight), url in urls.items():
                if arguments.steady is None:
                    measured = run_wave(url, num_streams)
                else:
                    measured = run_steadily(url, num_streams, arguments.steady)
                print(f"| {layout} | {in_flight} {row(num_streams, measured)}", flush=True)


if __name__ == "__main__":
    main()
