"""Paged attention as transformers models call it, and what it refuses to do silently wrong."""

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import AutoModel

from shardline_shards.attention import KVShape, PagedBatch, adapter, allocate_kv, select_backend

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation=adapter.register()).eval()


def step(model: PreTrainedModel, hidden: Tensor, start: int, paged: PagedBatch) -> Tensor:
    positions = torch.arange(start, start + hidden.shape[1])[None]
    output = model(inputs_embeds=hidden, position_ids=positions, paged=paged, use_cache=False)
    return output.last_hidden_state


def one_sequence(start: int, end: int, layers: dict) -> PagedBatch:
    return PagedBatch(
        query_start=torch.tensor([0, end - start], dtype=torch.int32),
        kv_lens=torch.tensor([end], dtype=torch.int32),
        block_tables=torch.tensor([[3, 1]], dtype=torch.int32),
        slots=torch.tensor([48 + i if i < 16 else i for i in range(start, end)]),
        max_query_len=end - start,
        max_kv_len=end,
        kv_layers=layers,
        backend=select_backend(torch.device("cpu"), torch.float32),
    )


@torch.inference_mode()
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        MistralConfig(**SIZES, sliding_window=7),
        Gemma2Config(**SIZES, sliding_window=7, attn_logit_softcapping=1.5),
    ],
    ids=lambda config: config.model_type,
)
def test_chunks_and_decodes_equal_the_whole_at_once(config: PreTrainedConfig) -> None:
    hidden = torch.randn(1, 27, 32, generator=torch.Generator().manual_seed(1))
    model = build(config)
    shape = KVShape(block_size=16, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    layers = allocate_kv(range(2), 4, shape, torch.device("cpu"))
    parts = [
        step(model, hidden[:, start:end], start, one_sequence(start, end, layers))
        for start, end in ((0, 11), (11, 12), (12, 25), (25, 26), (26, 27))
    ]
    model.set_attn_implementation("eager")
    whole = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


def forward_once(model: PreTrainedModel, **kwargs: object) -> None:
    shape = KVShape(block_size=16, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    layers = allocate_kv(range(2), 4, shape, torch.device("cpu"))
    with torch.inference_mode():
        model(inputs_embeds=torch.randn(1, 3, 32), paged=one_sequence(0, 3, layers), **kwargs)


def test_harmless_arguments_are_let_through() -> None:
    forward_once(build(LlamaConfig(**SIZES)), output_attentions=False, use_cache=False)


@pytest.mark.parametrize(
    "argument",
    [{"position_bias": torch.zeros(1)}, {"head_mask": torch.ones(4)}, {"is_causal": False}],
)
def test_arguments_that_would_change_the_result_are_refused_by_name(
    argument: dict[str, object],
) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(argument))):
        forward_once(build(LlamaConfig(**SIZES)), use_cache=False, **argument)


def test_attention_sinks_are_refused() -> None:
    config = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(NotImplementedError, match=r"GptOssAttention .*s_aux"):
        forward_once(build(config), use_cache=False)


def test_a_window_that_only_the_mask_knows_is_refused() -> None:
    config = PhimoeConfig(**SIZES, sliding_window=4, num_local_experts=2)
    with pytest.raises(NotImplementedError, match="sliding_attention through its mask alone"):
        forward_once(build(config), use_cache=False)
