"""What two stages gain and where their time goes, beside one stage, for several steps in flight.

    python bench/pipe.py demo --layouts 1x1 1x2 --in-flight 2 3 --streams 32

Options that it does not know go to the server. Starts `shardline serve` for each, sends waves of
streams that start together (256 random tokens in, 128 greedy ones out) to one after the other, and
reads from `/load` what became of the stages' time in between. One stage is served with 1 step in
flight and with 2, the second planned ahead.
"""

import argparse
import time
from contextlib import ExitStack
from typing import Any

import httpx
from client import bench
from serving import serving

PARTS = ("compute", "communication", "starved", "scheduler", "idle")


def pipe_seconds(url: str) -> list[dict[str, float]]:
    """Totals of each stage, once the last step has been told of."""
    before: Any = None
    while True:
        pipe = httpx.get(f"{url}/load").json()["pipe"]
        now = pipe and [stage["seconds"]["compute"] for stage in pipe["stages"]]
        if now is not None and now == before:
            return [stage["seconds"] for stage in pipe["stages"]]
        before = now
        time.sleep(0.6)


def run_wave(url: str, num_streams: int) -> dict[str, Any]:
    """Streams that start together: 256 random tokens in, 128 greedy ones out; the summary."""
    count = ("--concurrency", str(num_streams), "--num-requests", str(num_streams))
    (point,) = bench(url, [*count, "--prompt-tokens", "256", "--output-tokens", "128"])["points"]
    summary: dict[str, Any] = point["summary"]
    return summary


def measure(url: str, num_streams: int) -> str:
    """A wave, with the shares of the time in which there was work."""
    before = pipe_seconds(url)
    summary = run_wave(url, num_streams)
    after = pipe_seconds(url)
    shares = []
    for old, new in zip(before, after, strict=True):
        spent = {part: new[part] - old[part] for part in PARTS}
        busy = sum(spent.values()) - spent["idle"]
        shares.append(" / ".join(f"{spent[part] / busy:.1%}" for part in PARTS[:-1]))
    latencies = " | ".join(f"{summary[kind]['mean']:.1f}" for kind in ("tpot_ms", "ttft_ms"))
    rate = f"{summary['output_tokens_per_s']:.1f}"
    return f"| {num_streams} | {rate} | {latencies} | {' ; '.join(shares)} |"


def in_flight_options(layout: str, in_flight: int) -> list[str]:
    """What makes a server have so many steps in flight."""
    if layout.endswith("x1"):
        return ["--async-scheduling" if in_flight > 1 else "--no-async-scheduling"]
    return ["--max-in-flight", str(in_flight)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layouts", nargs="+", default=["1x1", "1x2"])
    parser.add_argument("--in-flight", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--streams", nargs="+", type=int, default=[32])
    parser.add_argument("--waves", type=int, default=1)
    arguments, options = parser.parse_known_args()
    print("Stages: compute / communication / starved / scheduler, of the time with work\n")
    print("| layout | in flight | streams | tokens/s | mean TPOT ms | mean TTFT ms | stages |")
    print("|---|---|---|---|---|---|---|")
    with ExitStack() as stack:
        urls = {}
        for layout in arguments.layouts:
            for in_flight in [1, 2] if layout.endswith("x1") else arguments.in_flight:
                given = [*options, *in_flight_options(layout, in_flight)]
                url, _ = stack.enter_context(serving(arguments.model, layout, given))
                urls[layout, in_flight] = url
                run_wave(url, 4)
        for num_streams in arguments.streams * arguments.waves:
            for (layout, in_flight), url in urls.items():
                print(f"| {layout} | {in_flight} {measure(url, num_streams)}", flush=True)


if __name__ == "__main__":
    main()
