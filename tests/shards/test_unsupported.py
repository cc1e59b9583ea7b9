"""Architectures that we cannot split, or not yet, are refused by name and reason."""

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from shardline_shards.collectives import SingleRank
from shardline_shards.errors import UnsupportedModel
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.stage import Stage
from shardline_shards.stage_model import build_stage_model
from tests.tiny import COMMON, FAMILIES

CPU = torch.device("cpu")


class RankOfTwo(SingleRank):
    """The shape of a split needs no other rank to talk to."""

    rank = 1
    size = 2


def make_config(family: str, architecture: str, **changes: object) -> PreTrainedConfig:
    config = CONFIG_MAPPING[family](**COMMON | changes)
    config.architectures = [architecture]
    return config


def build(config: PreTrainedConfig, tp: int = 1, stages: tuple[int, ...] = (3,)) -> Stage:
    layout = ParallelLayout(tp=tp, stage_layers=stages)
    ranks = RankOfTwo() if tp == 2 else SingleRank()
    place = Place(len(stages) - 1, ranks.rank)
    return Stage(build_stage_model(config, layout, place, ranks, torch.float32, CPU), CPU)


def test_no_tensor_plan() -> None:
    config = make_config("llama", "LlamaForCausalLM")
    config.base_model_tp_plan = None
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM.*--tp 1"):
        build(config, tp=2)


def test_no_pipeline_plan() -> None:
    config = make_config("llama", "LlamaForCausalLM")
    config.base_model_pp_plan = None
    build(config)
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM.*--pp 1"):
        build(config, stages=(2, 1))


def test_experts_over_ranks() -> None:
    config = make_config("mixtral", "MixtralForCausalLM", num_key_value_heads=3)
    with pytest.raises(UnsupportedModel, match=r"MixtralForCausalLM.*moe_tp_experts"):
        build(config, tp=2)


def test_attention_that_we_cannot_replace() -> None:
    with pytest.raises(UnsupportedModel, match="BloomForCausalLM does not take an attention"):
        build(make_config("bloom", "BloomForCausalLM", n_layer=3))


def test_layers_that_keep_another_state() -> None:
    config = make_config("qwen3", "Qwen3ForCausalLM")
    config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(UnsupportedModel, match=r"Qwen3ForCausalLM.*linear_attention"):
        build(config)


def test_more_ranks_than_heads() -> None:
    config = make_config("llama", "LlamaForCausalLM", num_attention_heads=1)
    with pytest.raises(ValueError, match="1 query heads cannot be dealt over 2 ranks"):
        build(config, tp=2)


def test_hidden_states_changed_before_the_first_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite scales embeddings in its forward; were that not undone, stages would scale again."""
    config = make_config("granite", "GraniteForCausalLM", **FAMILIES["granite"])
    assert not build(config, stages=(2, 1)).is_first
    monkeypatch.setattr(nn.Module, "embedding_multiplier", 3.0, raising=False)
    from transformers.models.granite.modeling_granite import GraniteModel

    monkeypatch.setattr(GraniteModel, "__setattr__", _ignore_multiplier)
    with pytest.raises(UnsupportedModel, match="changes hidden states before its first layer"):
        build(config, stages=(2, 1))


def _ignore_multiplier(module: nn.Module, name: str, value: object) -> None:
    if name != "embedding_multiplier":
        nn.Module.__setattr__(module, name, value)


def test_attention_with_weights_of_its_own() -> None:
    config = make_config("gpt_oss", "GptOssForCausalLM", num_key_value_heads=3)
    with pytest.raises(UnsupportedModel, match="GptOssForCausalLM"):
        build(config, tp=2)
