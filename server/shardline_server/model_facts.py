"""The few numbers of a model's config.json that are needed before any worker exists."""

import json
from dataclasses import dataclass
from pathlib import Path

from shardline_server.errors import ConfigError

_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Read without torch or transformers, whose import takes seconds."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    dtype: str | None


def read_model_facts(folder: Path) -> ModelFacts:
    """The facts of a model folder. Raises ConfigError, which names what is missing."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    keys = (
        *("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"),
        "max_position_embeddings",
    )
    missing = [key for key in keys if not isinstance(config.get(key), int)]
    if missing:
        raise ConfigError(
            f"{path} (model type {config.get('model_type')!r}) does not say {', '.join(missing)}; "
            "Shardline serves text-only causal language models"
        )
    num_query_heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
    dtype = config.get("dtype") or config.get("torch_dtype")
    return ModelFacts(
        num_layers=config["num_hidden_layers"],
        num_query_heads=num_query_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_query_heads,
        head_dim=config.get("head_dim") or hidden_size // num_query_heads,
        hidden_size=hidden_size,
        vocab_size=config["vocab_size"],
        max_model_len=config["max_position_embeddings"],
        dtype=dtype if dtype in _DTYPES else None,
    )
