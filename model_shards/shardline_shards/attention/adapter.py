"""Makes `transformers` models call paged attention; the only file here that imports transformers.

Set `config._attn_implementation = register()` before the model class is built, and pass the step's
`PagedBatch` to the model's forward as the keyword argument `paged`.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from shardline_shards.attention.interface import PagedBatch

IMPLEMENTATION_NAME = "shardline_paged"

_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


def register() -> str:
    """Register paged attention with transformers; returns the name to set in the model's config."""
    AttentionInterface.register(IMPLEMENTATION_NAME, paged_attention_forward)
    return IMPLEMENTATION_NAME


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    paged: PagedBatch,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write this step's keys and values, then attend; transformers calls this in every layer.

    `query` [1, num_heads, num_tokens, head_dim], `key` and `value` [1, num_kv_heads, num_tokens,
    head_dim], all tokens of the step one after the other. Returns [1, num_tokens, num_heads,
    head_dim] and no attention weights.
    Raises NotImplementedError for whatever would change the result and is not done here.
    """
    _refuse_unsupported(module, attention_mask, dropout, is_causal, kwargs)
    _refuse_lost_window(module, sliding_window)
    layer = paged.kv_layers[module.layer_idx]  # type: ignore[index]
    paged.backend.write(layer, _by_token(key), _by_token(value), paged.slots)
    output = paged.backend.attend(
        _by_token(query),
        layer,
        paged,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window or None,
        softcap=softcap,
    )
    return output.unsqueeze(0), None


def _by_token(states: Tensor) -> Tensor:
    return states.squeeze(0).transpose(0, 1)


def _refuse_unsupported(
    module: nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> None:
    asked = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
    asked |= {"attention_mask": attention_mask, "dropout": dropout or None}
    refused = sorted(name for name, value in asked.items() if value is not None)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        refused.append("is_causal=False")
    if refused:
        raise NotImplementedError(
            f"{type(module).__name__} asks for attention with {', '.join(refused)}, "
            "which paged attention does not do; this architecture cannot be served"
        )


def _refuse_lost_window(module: nn.Module, sliding_window: int | None) -> None:
    """Some models limit attention through the mask alone, which is never built here."""
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    else:
        kind = layer_types[module.layer_idx]
    is_lost = kind == "sliding_attention" and not sliding_window
    if is_lost or kind not in ("full_attention", "sliding_attention"):
        raise NotImplementedError(
            f"{type(module).__name__} limits layer {module.layer_idx} to {kind} through its mask "
            "alone, which paged attention never sees; this architecture cannot be served"
        )
