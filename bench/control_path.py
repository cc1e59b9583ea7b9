"""What a step takes beside the model's forward pass, with 32 streams through a real server.

    python bench/control_path.py demo [--layout 1x1] [--streams 32]

Options that it does not know go to the server. Starts `shardline serve` without a spare worker,
whose start takes a core for seconds, sends streams that start together, and looks at the server for
some seconds in which all of them decode: how many steps there were and what each stage's time went
to (`/load`), and the processor time of every process. What the worker does in a step around the
forward pass is measured apart, in this process: `/load` counts it as computing. Memory is read
before each time, since a step's weights leave nothing else in the caches: that is most of it.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx
import psutil
import torch
from client import bench
from serving import serving

from shardline_scheduler.plan import Chunk, Decodes, NewRequest, SamplingParams, StepPlan
from shardline_shards.attention import KVShape, allocate_kv, select_backend
from shardline_shards.batch import BatchBuilder, RequestTable
from shardline_shards.drawing import draw

CPU = torch.device("cpu")
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 64, 500
WATCHED_S = 8.0
BLOCK_SIZE, VOCAB_SIZE, NUM_CONTEXT_TOKENS = 16, 49_152, 300
NUM_ROUNDS = 200
WEIGHTS_BYTES = 1 << 28


@dataclass(frozen=True)
class Look:
    """Totals of a server at one moment; `stages` are seconds by what they went to."""

    at_s: float
    num_steps: int
    stages: list[dict[str, float]]
    processor_s: dict[str, float]


def look(url: str) -> Look:
    pipe: dict[str, Any] = httpx.get(f"{url}/load").json()["pipe"]
    stages = [stage["seconds"] for stage in pipe["stages"]]
    return Look(time.perf_counter(), pipe["num_steps"], stages, processor_s())


def processor_s() -> dict[str, float]:
    """Of each process of the server."""
    times = {}
    for child in psutil.Process().children(recursive=True):
        words = child.cmdline()
        title = " ".join(words).strip()
        name = "front end" if "serve" in words else title.removeprefix("shardline: ")
        if name != title or "serve" in words:
            used = child.cpu_times()
            times[name] = used.user + used.system
    return times


def wait_until_all_decode(url: str, num_streams: int) -> None:
    while True:
        load = httpx.get(f"{url}/load").json()
        if load["num_requests_running"] == num_streams and not load["num_requests_waiting"]:
            return
        time.sleep(0.2)


def watch(url: str, num_streams: int) -> tuple[Look, Look]:
    """Before and after some seconds of that many streams."""
    options = ["--concurrency", str(num_streams), "--num-requests", str(num_streams)]
    options += ["--prompt-tokens", str(NUM_PROMPT_TOKENS)]
    options += ["--output-tokens", str(NUM_OUTPUT_TOKENS)]
    with ThreadPoolExecutor(1) as background:
        load = background.submit(bench, url, options)
        wait_until_all_decode(url, num_streams)
        before = look(url)
        time.sleep(WATCHED_S)
        after = look(url)
        assert not load.done(), "the streams ended too early; raise NUM_OUTPUT_TOKENS"
        load.result()
    return before, after


def report(before: Look, after: Look) -> None:
    num_steps = after.num_steps - before.num_steps
    wall_ms = (after.at_s - before.at_s) * 1e3 / num_steps
    print(f"{num_steps} steps of {wall_ms:.2f} ms; ms a step:")
    for index, (old, new) in enumerate(zip(before.stages, after.stages, strict=True)):
        spent = {part: (new[part] - old[part]) * 1e3 / num_steps for part in new}
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in spent.items())
        print(f"  stage {index}: {parts}")
    for name, used_s in after.processor_s.items():
        used_ms = (used_s - before.processor_s[name]) * 1e3 / num_steps
        print(f"  {name + ', processor time:':34} {used_ms:.2f}")


def report_worker(num_streams: int) -> None:
    """What the worker does around the forward pass, median of some steps of decodes."""
    shape = KVShape(block_size=BLOCK_SIZE, num_kv_heads=3, head_dim=64, dtype=torch.bfloat16)
    num_blocks = -(-NUM_CONTEXT_TOKENS // BLOCK_SIZE)
    kv_layers = allocate_kv([0], num_streams * num_blocks, shape, CPU)
    batches = BatchBuilder(kv_layers, BLOCK_SIZE, select_backend(CPU, shape.dtype), CPU)
    sampling = SamplingParams(max_tokens=1000, seed=0, temperature=0.0)
    requests, tokens = RequestTable(), [1] * NUM_CONTEXT_TOKENS
    new = [NewRequest(i, tokens, len(tokens), sampling) for i in range(num_streams)]
    blocks = [list(range(i * num_blocks, (i + 1) * num_blocks)) for i in range(num_streams)]
    first = [Chunk(i, 0, len(tokens), blocks[i], True) for i in range(num_streams)]
    requests.apply(StepPlan(0, new_requests=new, chunks=first))
    indexes = list(range(num_streams))
    decodes = Decodes(indexes, [len(tokens) - 1] * num_streams, [1] * num_streams)
    plan = StepPlan(1, decodes=decodes)
    batch, logits = batches.build(plan, requests), torch.randn(num_streams, VOCAB_SIZE)
    print(
        f"  {'worker, making the batch:':34} {median_ms(lambda: batches.build(plan, requests)):.2f}"
    )
    drawing_ms = median_ms(lambda: draw(1, batch, logits, requests))
    print(f"  {'worker, drawing greedily:':34} {drawing_ms:.2f}")


def median_ms(run: Callable[[], object]) -> float:
    times, weights = [], torch.ones(WEIGHTS_BYTES // 8, dtype=torch.int64)
    for _ in range(NUM_ROUNDS):
        weights.sum()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layout", default="1x1")
    parser.add_argument("--streams", type=int, default=32)
    arguments, options = parser.parse_known_args()
    with serving(arguments.model, arguments.layout, ["--no-spare-worker", *options]) as (url, _):
        report(*watch(url, arguments.streams))
    report_worker(arguments.streams)


if __name__ == "__main__":
    main()
