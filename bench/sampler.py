"""Time of the sampler for a batch of 16 rows over a vocabulary of 49,152, on one core.

    python bench/sampler.py

`peaked` logits are like a trained model's (Zipf's law); `flat` ones are normal noise, whose nucleus
holds thousands of tokens; of the `mixed` ones a quarter is flat. Times are the best of some rounds,
in milliseconds of one thread's processor time for the whole batch, so that other processes matter
less.
"""

import time

import torch
from torch import Tensor

from shardline_scheduler.plan import SamplingParams
from shardline_shards.sampling import SampleRow, sample

NUM_ROWS, VOCAB_SIZE, NUM_ROUNDS = 16, 49_152, 15

PARAMS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "temperature 0.8": {"temperature": 0.8},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50": {"top_k": 50},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "greedy, 5 logprobs": {"temperature": 0.0, "num_logprobs": 5},
}


def peaked_logits() -> Tensor:
    ranks = torch.stack([torch.randperm(VOCAB_SIZE) for _ in range(NUM_ROWS)]) + 1
    return -1.5 * ranks.log() + torch.randn(NUM_ROWS, VOCAB_SIZE)


def flat_logits() -> Tensor:
    return 3 * torch.randn(NUM_ROWS, VOCAB_SIZE)


def mixed_logits() -> Tensor:
    num_flat = NUM_ROWS // 4
    return torch.cat([flat_logits()[:num_flat], peaked_logits()[num_flat:]])


def best_ms(logits: Tensor, rows: list[SampleRow]) -> float:
    times = []
    for _ in range(NUM_ROUNDS):
        start = time.thread_time()
        sample(logits, rows)
        times.append(time.thread_time() - start)
    return min(times) * 1e3


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kinds = [peaked_logits(), flat_logits(), mixed_logits()]
    print(f"{NUM_ROWS} rows; ms a batch                      peaked     flat    mixed")
    for name, params in PARAMS.items():
        token_ids = torch.randint(VOCAB_SIZE, (400,)).tolist()
        rows = [
            SampleRow(SamplingParams(max_tokens=200, seed=seed, **params), token_ids, 256)
            for seed in range(NUM_ROWS)
        ]
        times = [best_ms(logits, rows) for logits in kinds]
        print(f"{name:38}" + "".join(f"{ms:9.2f}" for ms in times))


if __name__ == "__main__":
    main()
