"""The demo model on real prompts, split in every way, against `transformers.generate` itself."""

from pathlib import Path

import pytest
import torch
from tests.engine_process import running_engine
from tests.oracle import load_oracle
from transformers import AutoTokenizer

from shardline_scheduler.plan import SamplingParams
from shardline_shards.layout import ParallelLayout

NUM_TOKENS = 24
LAYOUTS = {
    "1x1": ParallelLayout(tp=1, stage_layers=(30,)),
    "1x2": ParallelLayout(tp=1, stage_layers=(15, 15)),
    "2x1": ParallelLayout(tp=2, stage_layers=(30,)),
    "3x1": ParallelLayout(tp=3, stage_layers=(30,)),
    "2x2": ParallelLayout(tp=2, stage_layers=(14, 16)),
}
PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "The three laws of thermodynamics are",
    "To make a good cup of tea, first",
    "In 1969, the first human",
    "The opposite of hot is",
    "SELECT name FROM users WHERE",
    "My favourite season is autumn because",
    "Photosynthesis is the process by which",
    "List three primary colours:",
    "The square root of 144 is",
    "Dear hiring manager,",
    "A haiku about the moon:",
    "The largest planet in the solar system",
    "If all roses are flowers and some flowers fade,",
    "The recipe calls for two eggs, a cup of flour and",
    "Shakespeare wrote",
    "import numpy as np\n",
]


@pytest.fixture(scope="module")
def prompts(demo_model: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected(demo_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """New tokens of `generate`, without the end-of-sequence token's special place."""
    model = load_oracle(demo_model)
    continuations = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        continuations.append(output[0, len(prompt) :].tolist())
    return continuations


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_greedy_tokens_equal_generate(
    demo_model: Path, prompts: list[list[int]], expected: list[list[int]], layout: ParallelLayout
) -> None:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0)
    requests = {text: (tokens, sampling) for text, tokens in zip(PROMPTS, prompts, strict=True)}
    with running_engine(demo_model, layout) as engine:
        outcomes = engine.generate(requests)
    assert [outcomes[text].token_ids for text in PROMPTS] == expected
