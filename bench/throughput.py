"""Tokens per second over HTTP at 1, 8 and 32 streams, for several layouts of one model.

    python bench/throughput.py demo --layouts 1x1 1x2 2x1

Starts `shardline serve` for each layout (tp x pp) in turn, sends random prompts of 256 tokens, asks
for 128 greedy tokens with the end of sequence ignored, and prints a markdown table.
"""

import argparse
import asyncio
import contextlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

import httpx

NUM_INPUT_TOKENS = 256
NUM_OUTPUT_TOKENS = 128
FIRST_ORDINARY_ID = 1000


@dataclass(frozen=True)
class Timing:
    """One stream: seconds from sending to the first and to the last token."""

    ttft_s: float
    e2e_s: float

    @property
    def tpot_ms(self) -> float:
        return (self.e2e_s - self.ttft_s) / (NUM_OUTPUT_TOKENS - 1) * 1000


async def stream(client: httpx.AsyncClient, model: str, prompt: list[int]) -> Timing:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": NUM_OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first, usage = time.perf_counter(), 0.0, ""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - start
                usage = line
    assert f'"completion_tokens":{NUM_OUTPUT_TOKENS}' in usage, usage
    return Timing(first, time.perf_counter() - start)


async def run_streams(url: str, model: str, num_streams: int, rng: random.Random) -> str:
    """One wave of streams that start together; a row of the table."""
    prompts = [
        [rng.randrange(FIRST_ORDINARY_ID, 40_000) for _ in range(NUM_INPUT_TOKENS)]
        for _ in range(num_streams)
    ]
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        start = time.perf_counter()
        timings = await asyncio.gather(*(stream(client, model, prompt) for prompt in prompts))
        seconds = time.perf_counter() - start
    throughput = num_streams * NUM_OUTPUT_TOKENS / seconds
    ttft_ms = mean(timing.ttft_s for timing in timings) * 1000
    tpot_ms = mean(timing.tpot_ms for timing in timings)
    return f"| {num_streams} | {throughput:.1f} | {tpot_ms:.1f} | {ttft_ms:.0f} |"


@contextlib.contextmanager
def server(model: str, layout: str, options: list[str]) -> Iterator[tuple[str, float]]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layouts", nargs="+", default=["1x1", "1x2", "2x1"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--name", help="the served model's name, if it is not MODEL")
    arguments, options = parser.parse_known_args()
    for layout in arguments.layouts:
        with server(arguments.model, layout, options) as (url, ready_s):
            print(f"\n{layout} (tp x pp), ready after {ready_s:.1f} s\n")
            print("| streams | tokens/s | mean TPOT ms | mean TTFT ms |\n|---|---|---|---|")
            name, rng = arguments.name or arguments.model, random.Random(0)
            asyncio.run(run_streams(url, name, 1, rng))  # the first request pays for warming up
            for num_streams in arguments.streams:
                print(asyncio.run(run_streams(url, name, num_streams, rng)), flush=True)


if __name__ == "__main__":
    main()
