"""What a model's folder says: end tokens and sampling defaults."""

import json
import shutil

import pytest

from shardline_server.errors import ConfigError, ModelNotFound
from shardline_server.messages import EngineReady
from shardline_server.served_model import load_model_files

READY = EngineReady(max_model_len=64, num_kv_blocks=8, block_size=16, vocab_size=512)


@pytest.fixture
def folder(tokenizer_folder, tmp_path):
    return shutil.copytree(tokenizer_folder, tmp_path / "model")


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_the_tokenizers_end_token_always_ends(folder):
    assert load_model_files(folder).eos_token_ids == {2}


def test_generation_config_wins_over_config(folder):
    write(folder, "config.json", {"eos_token_id": 9})
    assert load_model_files(folder).eos_token_ids == {2, 9}
    write(folder, "generation_config.json", {"eos_token_id": [5, 6]})
    assert load_model_files(folder).eos_token_ids == {2, 5, 6}


def test_a_nested_text_config_is_read(folder):
    write(folder, "config.json", {"text_config": {"eos_token_id": 11}})
    assert load_model_files(folder).eos_token_ids == {2, 11}


def test_sampling_defaults_come_from_generation_config(folder):
    write(folder, "generation_config.json", {"temperature": 0.6, "top_k": 20, "do_sample": True})
    defaults = load_model_files(folder).defaults
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.6, 20, 1.0)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_file_is_named(folder, content):
    write(folder, "generation_config.json", content)
    with pytest.raises(ConfigError, match="generation_config"):
        load_model_files(folder)


def test_names(folder):
    model = load_model_files(folder).serve(("a", "b"), READY, created=1)
    assert [model.require_name(name) for name in (None, "", "b")] == ["a", "a", "b"]
    with pytest.raises(ModelNotFound, match="`a`, `b`"):
        model.require_name("c")
