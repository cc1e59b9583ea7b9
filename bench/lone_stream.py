"""The time per token of a lone stream, beside what reading the weights once takes.

    python bench/lone_stream.py demo [--layout 1x1] [--rounds 10]

Options that it does not know go to the server. What memory yields moves from one second to the next
where others share it. So the two take turns: a stream (256 random tokens in, 128 greedy ones out)
to `shardline serve`, then reads of as many bytes as a token has weights, with as many threads as
there are cores, while the server is idle. The floor of a round is the median of its reads.
"""

import argparse
import time
from statistics import mean, median

import torch
from client import bench
from serving import serving
from stage import load, reads_ms

NUM_READS = 60
SETTLING_S = 15.0  # The server starts its spare worker meanwhile, which takes a core.
STREAM = ["--concurrency", "1", "--prompt-tokens", "256", "--output-tokens", "128"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layout", default="1x1")
    parser.add_argument("--rounds", type=int, default=10)
    arguments, options = parser.parse_known_args()
    _, num_bytes = load(arguments.model, torch.bfloat16)
    tokens, floors = [], []
    print(f"{num_bytes / 1e6:.0f} MB, {torch.get_num_threads()} threads read\n")
    print("| round | ms per token | floor ms | ratio |\n|---|---|---|---|")
    with serving(arguments.model, arguments.layout, options) as (url, _):
        time.sleep(SETTLING_S)
        for index in range(arguments.rounds):
            (point,) = bench(url, [*STREAM, "--num-requests", "2"])["points"]
            tokens.append(point["summary"]["tpot_ms"]["mean"])
            floors.append(median(reads_ms(num_bytes, NUM_READS)))
            row(str(index + 1), tokens[-1], floors[-1])
    row("mean", mean(tokens), mean(floors))


def row(name: str, token_ms: float, floor_ms: float) -> None:
    print(f"| {name} | {token_ms:.2f} | {floor_ms:.2f} | {token_ms / floor_ms:.2f} |", flush=True)


if __name__ == "__main__":
    main()
