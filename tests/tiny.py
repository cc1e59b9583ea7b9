"""Tiny random models of real architectures, saved as a folder like any other model."""

from pathlib import Path

import torch
import transformers

VOCAB_SIZE = 101  # uneven over 2 and over 3 ranks
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 3}
EXPLICIT_HEAD = {"head_dim": 8}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

# What makes each family different from llama is what its entry sets.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": GROUPED | {"tie_word_embeddings": True},
    "mistral": GROUPED | EXPLICIT_HEAD | {"sliding_window": 7},
    "qwen2": GROUPED,
    "qwen3": GROUPED | EXPLICIT_HEAD,
    "gemma2": GROUPED | EXPLICIT_HEAD | WINDOWS | {"sliding_window": 7, "query_pre_attn_scalar": 8},
    "gemma3_text": EXPLICIT_HEAD | WINDOWS | {"num_key_value_heads": 1, "sliding_window": 7},
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "granite": GROUPED
    | {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "starcoder2": GROUPED | {"sliding_window": 7},
    "gpt_neox": {},
}


def save_tiny(family: str, folder: Path, seed: int = 0, **overrides: object) -> Path:
    """Save a random fp32 model of `family` as safetensors; the same seed gives the same weights."""
    config = transformers.CONFIG_MAPPING[family](**COMMON | FAMILIES[family] | overrides)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=0.0 if "bias" in name else 1.0, std=0.2)
    model.save_pretrained(folder)
    return folder
