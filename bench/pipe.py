"""What two stages gain and where their time goes, beside one stage, for several steps in flight.

    python bench/pipe.py demo --layouts 1x1 1x2 --in-flight 2 3 --streams 32

Options that it does not know go to the server. Starts `shardline serve` for each, sends waves of
streams that start together (256 random tokens in, 128 greedy ones out), and reads from `/load` what
became of the stages' time in between.
"""

import argparse
import asyncio
import random
from typing import Any

import httpx
from throughput import run_streams, server

PARTS = ("compute", "communication", "starved", "scheduler", "idle")


async def pipe_seconds(url: str) -> list[dict[str, float]]:
    """Totals of each stage, once the last step has been told of."""
    async with httpx.AsyncClient(base_url=url) as client:
        before: Any = None
        while True:
            pipe = (await client.get("/load")).json()["pipe"]
            now = pipe and [stage["seconds"]["compute"] for stage in pipe["stages"]]
            if now is not None and now == before:
                return [stage["seconds"] for stage in pipe["stages"]]
            before = now
            await asyncio.sleep(0.6)


async def measure(url: str, name: str, num_streams: int, rng: random.Random) -> str:
    """A wave, with the shares of the time in which there was work."""
    before = await pipe_seconds(url)
    row = await run_streams(url, name, num_streams, rng)
    after = await pipe_seconds(url)
    shares = []
    for old, new in zip(before, after, strict=True):
        spent = {part: new[part] - old[part] for part in PARTS}
        busy = sum(spent.values()) - spent["idle"]
        shares.append(" / ".join(f"{spent[part] / busy:.1%}" for part in PARTS[:-1]))
    return f"{row} {' ; '.join(shares)} |"


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
    for layout in arguments.layouts:
        for in_flight in arguments.in_flight if layout != "1x1" else [1]:
            given = [*options, "--max-in-flight", str(in_flight)]
            with server(arguments.model, layout, given) as (url, _):
                rng = random.Random(0)
                asyncio.run(run_streams(url, arguments.model, 4, rng))
                for num_streams in arguments.streams * arguments.waves:
                    row = asyncio.run(measure(url, arguments.model, num_streams, rng))
                    print(f"| {layout} | {in_flight} {row}", flush=True)


if __name__ == "__main__":
    main()
