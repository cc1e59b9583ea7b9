"""What is wrong with a model folder is said by name, before anything runs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardline_shards.checkpoint import INDEX_NAME, load_weights
from shardline_shards.collectives import SingleRank
from shardline_shards.errors import LoadError, ModelSourceError, UnsupportedModel
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.stage_model import build_stage_model, load_config
from tests.tiny import save_tiny

CPU = torch.device("cpu")
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path)


def load(folder: Path, layout: ParallelLayout | None = None) -> None:
    layout = layout or ParallelLayout(tp=1, stage_layers=(3,))
    place = Place(0, 0)
    stage = build_stage_model(load_config(folder), layout, place, SingleRank(), torch.float32, CPU)
    load_weights(stage, folder, CPU)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / FILE)
    tensors[new] = tensors.pop(old)
    save_file(tensors, folder / FILE)


def shard_in_two(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = sorted(tensors)
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(part, folder / file)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def test_indexed_files_load(folder: Path) -> None:
    shard_in_two(folder)
    load(folder)


def test_a_base_models_names_load(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / FILE)
    load(folder)


def test_missing_shard_file(folder: Path) -> None:
    shard_in_two(folder)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(LoadError, match=r"names part-1\.safetensors, which is not there"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, 5000])
def test_truncated_file(folder: Path, kept: int) -> None:
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:kept])
    with pytest.raises(LoadError, match="damaged or cut short"):
        load(folder)


def test_missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / FILE)
    with pytest.raises(LoadError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load(folder)


def test_tensor_that_nobody_wants(folder: Path) -> None:
    rename(folder, "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.extra.weight")
    with pytest.raises(LoadError, match=r"such as 'model\.layers\.1\.mlp\.extra\.weight'"):
        load(folder)


def test_stored_rotary_frequencies_are_no_mistake(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(tensors, folder / FILE)
    load(folder)


def test_an_index_that_leads_out_of_the_folder(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ModelSourceError, match="lies outside of it"):
        load(folder)


def test_wrong_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=60)
    with pytest.raises(LoadError, match=r"has shape \[50, 36\].*needs \[60, 36\]"):
        load(folder)


def test_only_pickle_files(folder: Path) -> None:
    (folder / FILE).rename(folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match="no safetensors file"):
        load(folder)


@pytest.mark.parametrize(
    "changes", [{"model_type": "unheard_of"}, {"architectures": ["UnheardOfForCausalLM"]}]
)
def test_unknown_class(folder: Path, changes: dict[str, object]) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedModel, match=r"unheard_of|UnheardOfForCausalLM"):
        load(folder)


def test_class_that_is_no_language_model(folder: Path) -> None:
    edit_config(folder, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UnsupportedModel, match="LlamaForSequenceClassification"):
        load(folder)
