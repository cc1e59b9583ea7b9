"""The naive way to generate, with nothing of ours in it: all of the sequence for every token."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_oracle(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


@torch.inference_mode()
def generate_greedily(
    model: PreTrainedModel, token_ids: Sequence[int], num_tokens: int, stop_ids: Sequence[int] = ()
) -> list[int]:
    """The greedy continuation, at most `num_tokens`, ended by a stop id (which is included)."""
    tokens = list(token_ids)
    for _ in range(num_tokens):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(token_ids) :]
