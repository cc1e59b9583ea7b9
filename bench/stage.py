"""Milliseconds of one step of a whole model on this CPU, beside what memory alone would take.

    OMP_WAIT_POLICY=PASSIVE python bench/stage.py demo [--context 300] [--modules] [--beside 1.5/8]

Steps of 1, 4, 8 and 32 decodes over so many tokens each, and of prompts of 32 to 256 tokens: the
forward pass from token ids to logits, without scheduling and sampling. The floor is what reading as
many bytes as a token has weights takes, measured in the same run. `--modules` measures the
library's own modules, `--beside 1.5/8` decodes while another process computes for 1.5 ms, sleeps
for 8, and so on, as an engine and a front end do.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import numpy as np
import torch

from shardline_scheduler.plan import Chunk, NewRequest, SamplingParams, StepPlan
from shardline_shards.attention import KVShape, allocate_kv, select_backend
from shardline_shards.batch import BatchBuilder, RequestTable, StepBatch
from shardline_shards.checkpoint import load_weights
from shardline_shards.collectives import SingleRank
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.sources import resolve_model
from shardline_shards.stage import Stage
from shardline_shards.stage_model import StageModel, build_stage_model, load_config

CPU = torch.device("cpu")
BLOCK_SIZE = 16
NUM_DECODES = (1, 4, 8, 32)
NUM_PROMPT_TOKENS = (32, 64, 128, 256)
# Computes for so many milliseconds, sleeps for so many, and so on.
OTHER_PROCESS = """
import sys, time
busy_s, idle_s = (float(ms) / 1e3 for ms in sys.argv[1].split("/"))
while True:
    end = time.perf_counter() + busy_s
    while time.perf_counter() < end:
        pass
    time.sleep(idle_s)
"""


def load(model: str, dtype: torch.dtype) -> tuple[StageModel, int]:
    """The whole model, and the bytes that one token reads: all but the embedding's other rows."""
    folder = resolve_model(model)
    config = load_config(folder)
    layout = ParallelLayout(tp=1, stage_layers=(config.num_hidden_layers,))
    stage_model = build_stage_model(config, layout, Place(0, 0), SingleRank(), dtype, CPU)
    load_weights(stage_model, folder, CPU)
    num_bytes = sum(parameter.nbytes for parameter in stage_model.model.parameters())
    if not config.tie_word_embeddings:
        num_bytes -= stage_model.model.get_input_embeddings().weight.nbytes
    return stage_model, num_bytes


def make_batches(stage: Stage, num_context_tokens: int) -> BatchBuilder:
    config, dtype = stage.config, stage.dtype
    shape = KVShape(
        block_size=BLOCK_SIZE,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        dtype=dtype,
    )
    num_blocks = max(NUM_DECODES) * -(-num_context_tokens // BLOCK_SIZE)
    kv_layers = allocate_kv(range(config.num_hidden_layers), num_blocks, shape, CPU)
    for layer in kv_layers.values():
        layer.key.normal_()
        layer.value.normal_()
    return BatchBuilder(kv_layers, BLOCK_SIZE, select_backend(CPU, dtype), CPU)


def make_batch(batches: BatchBuilder, num_requests: int, first: int, count: int) -> StepBatch:
    """`num_requests` requests that compute `count` tokens after the first `first`."""
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    tokens = [(7 * i) % 1000 for i in range(first + count)]
    num_blocks = -(-len(tokens) // BLOCK_SIZE)
    new = [NewRequest(index, tokens, len(tokens), sampling) for index in range(num_requests)]
    chunks = [
        Chunk(i, first, count, list(range(i * num_blocks, (i + 1) * num_blocks)), True)
        for i in range(num_requests)
    ]
    requests, plan = RequestTable(), StepPlan(0, new_requests=new, chunks=chunks)
    requests.apply(plan)
    return batches.build(plan, requests)


def timed_ms(run: Callable[[], object], num_rounds: int) -> list[float]:
    times = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def reads_ms(num_bytes: int, num_rounds: int) -> list[float]:
    """What it takes to read so much memory once, with all threads."""
    memory = torch.from_numpy(np.ones(num_bytes // 8, dtype=np.int64))
    return timed_ms(memory.sum, num_rounds)


@contextmanager
def another_process(times_ms: str) -> Iterator[None]:
    """That wants a core, time and again."""
    other = subprocess.Popen([sys.executable, "-c", OTHER_PROCESS, times_ms])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def measure(stage: Stage, name: str, batch: StepBatch, floor: float) -> None:
    num_rounds = 10 if batch.num_tokens > max(NUM_DECODES) else 30
    stage.run(batch, None)
    times = timed_ms(lambda: stage.run(batch, None), num_rounds)
    print(f"{name:16} best {min(times):7.2f} ms, median {median(times):7.2f} ms", end="")
    print(f"   {min(times) / floor:5.2f} x floor", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=300, help="tokens of each decode")
    parser.add_argument("--modules", action="store_true")
    parser.add_argument("--beside", metavar="MS/MS", help="what another process computes, sleeps")
    arguments = parser.parse_args()
    stage_model, num_bytes = load(arguments.model, getattr(torch, arguments.dtype))
    start = time.perf_counter()
    stage = Stage(stage_model, CPU, allow_fused=not arguments.modules)
    print(f"{torch.get_num_threads()} threads, packed in {time.perf_counter() - start:.2f} s")
    floor = min(reads_ms(num_bytes, 15))
    print(f"floor: {num_bytes / 1e6:.0f} MB in {floor:.2f} ms, {num_bytes / floor / 1e6:.1f} GB/s")
    batches = make_batches(stage, max(arguments.context, *NUM_PROMPT_TOKENS))
    decodes = {n: make_batch(batches, n, arguments.context - 1, 1) for n in NUM_DECODES}
    for num_decodes, batch in decodes.items():
        measure(stage, f"{num_decodes} decodes", batch, floor)
    if arguments.beside is not None:
        with another_process(arguments.beside):
            for num_decodes, batch in decodes.items():
                measure(stage, f"{num_decodes} beside it", batch, floor)
        return
    for num_tokens in NUM_PROMPT_TOKENS:
        batch = make_batch(batches, 1, 0, num_tokens)
        measure(stage, f"{num_tokens} of a prompt", batch, floor)


if __name__ == "__main__":
    main()
