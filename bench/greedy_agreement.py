"""How many greedy continuations of the demo model in bf16 agree with `transformers.generate`.

    python bench/greedy_agreement.py [MODEL_FOLDER]

For each layout: continuations that are equal token for token; and where one differs, how far apart
the two candidates were in the fp32 model's logits at that very place. In bf16 logits
between 16 and 32 are 0.125 apart, so candidates closer than that are a toss-up that
any other order of summation may decide the other way.
"""

import sys
from pathlib import Path

import torch
from tests.engine_process import running_engine
from tests.oracle import load_oracle
from tests.server.test_demo_model import LAYOUTS, PROMPTS
from transformers import AutoTokenizer, PreTrainedModel

from shardline_scheduler.plan import SamplingParams
from shardline_shards.sources import resolve_model

NUM_TOKENS = 64


def generate(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((index for index, (a, b) in pairs if a != b), None)


@torch.inference_mode()
def gap(model: PreTrainedModel, context: list[int], ours: int, theirs: int) -> float:
    """Distance of the two candidates' logits after `context`, in the fp32 model."""
    logits = model(torch.tensor([context])).logits[0, -1]
    return abs(float(logits[ours] - logits[theirs]))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else resolve_model("demo")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    exact, half = load_oracle(folder), load_oracle(folder, torch.bfloat16)
    expected = [generate(half, prompt) for prompt in prompts]
    sampling = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0)
    requests = {str(i): (prompt, sampling) for i, prompt in enumerate(prompts)}
    print(f"{len(prompts)} prompts, {NUM_TOKENS} tokens each, bf16 against transformers in bf16")
    for name, layout in LAYOUTS.items():
        with running_engine(folder, layout, dtype="bfloat16") as engine:
            outcomes = engine.generate(requests)
        gaps = []
        for i, prompt in enumerate(prompts):
            ours = outcomes[str(i)].token_ids
            at = first_difference(ours, expected[i])
            if at is not None:
                gaps.append(gap(exact, prompt + ours[:at], ours[at], expected[i][at]))
        equal = len(prompts) - len(gaps)
        listed = ", ".join(f"{value:.3f}" for value in sorted(gaps))
        print(f"{name}: {equal} equal; fp32 gaps where the others part: {listed or 'none'}")


if __name__ == "__main__":
    main()
