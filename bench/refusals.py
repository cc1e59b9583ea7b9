"""How soon a burst of requests is refused by a server that is busy, and what that costs.

    python bench/refusals.py demo [--layout 1x1] [--burst 64] [--bursts 10] [--pause 1.0]

Options that it does not know go to the server. So many streams have all the seats there are, each
promised its time per token; then bursts of requests come that ask for a budget, and each is refused
with when to come back. Told are the times from sending to the refusal, and the processor time of
every process for one of them, beside what the streams take in as much time without bursts.
"""

import argparse
import asyncio
import time
from dataclasses import dataclass
from statistics import quantiles

import psutil
import uvloop
from control_path import processor_s
from serving import serving

from shardline_client import AsyncClient, BudgetUnmet
from shardline_client.stream import AsyncStream

NUM_STREAMS = 16
NUM_PROMPT_TOKENS = 256
NUM_OUTPUT_TOKENS = 6_000
BUDGET = {"ttft_ms": 60_000, "tpot_ms": 1_000}
SERVER = ["--no-spare-worker", "--max-num-seqs", str(NUM_STREAMS)]


@dataclass
class Period:
    """What processes used in it."""

    wall_s: float
    processor_s: dict[str, float]


def look() -> Period:
    own = psutil.Process().cpu_times()
    return Period(time.perf_counter(), processor_s() | {"client": own.user + own.system})


def since(before: Period) -> Period:
    now = look()
    used = {name: now.processor_s[name] - used_s for name, used_s in before.processor_s.items()}
    return Period(now.wall_s - before.wall_s, used)


def ask(client: AsyncClient, number: int, num_tokens: int) -> AsyncStream:
    prompt = [1 + number % 997, *range(1, NUM_PROMPT_TOKENS)]
    options = {"max_tokens": num_tokens, "ignore_eos": True, "latency_budget": BUDGET}
    return client.stream_complete(prompt, **options)


async def read(stream: AsyncStream, has_begun: asyncio.Event) -> None:
    async for _ in stream:
        has_begun.set()


async def refusal_s(client: AsyncClient, number: int) -> float:
    sent = time.perf_counter()
    try:
        await ask(client, number, 64).collect()
    except BudgetUnmet as error:
        assert error.retry_after_s, "it is not told when to come back"
        return time.perf_counter() - sent
    raise AssertionError("a request was served that had no seat")


async def measure(url: str, burst: int, num_bursts: int, pause_s: float) -> None:
    async with AsyncClient(url) as client, asyncio.TaskGroup() as group:
        begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
        streams = [ask(client, number, NUM_OUTPUT_TOKENS) for number in range(NUM_STREAMS)]
        for stream, event in zip(streams, begun, strict=True):
            group.create_task(read(stream, event))
        await asyncio.gather(*(event.wait() for event in begun))
        before = look()
        await asyncio.sleep(num_bursts * pause_s)
        quiet, before, times_s = since(before), look(), []
        for first in range(0, num_bursts * burst, burst):
            begin = time.perf_counter()
            numbers = range(first, first + burst)
            times_s += await asyncio.gather(*(refusal_s(client, i) for i in numbers))
            await asyncio.sleep(begin + pause_s - time.perf_counter())
        report(times_s, quiet, since(before))
        for stream in streams:
            stream.abort()


def report(times_s: list[float], quiet: Period, busy: Period) -> None:
    cuts = quantiles(times_s, n=100)
    print(f"{len(times_s)} refusals: {1e3 * cuts[49]:.1f} ms median, {1e3 * cuts[98]:.1f} p99;")
    print("ms of a core for each:")
    for name, used_s in busy.processor_s.items():
        more_s = used_s - quiet.processor_s[name] * busy.wall_s / quiet.wall_s
        print(f"  {name:34} {1e3 * more_s / len(times_s):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layout", default="1x1")
    parser.add_argument("--burst", type=int, default=64)
    parser.add_argument("--bursts", type=int, default=10)
    parser.add_argument("--pause", type=float, default=1.0, help="s from burst to burst")
    arguments, options = parser.parse_known_args()
    with (
        serving(arguments.model, arguments.layout, [*SERVER, *options]) as (url, _),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(measure(url, arguments.burst, arguments.bursts, arguments.pause))


if __name__ == "__main__":
    main()
