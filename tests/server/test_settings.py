from pathlib import Path

import pytest
from pydantic import ValidationError

from shardline_server.errors import ConfigError
from shardline_server.settings import ServeSettings, load_settings


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "shardline.yaml"
    file.write_text("model: from-file\ntp: 2\npp: 3\nmax_num_seqs: 7\n")
    return file


def refusal(given: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(given)
    return caught.value.message


def test_command_line_beats_variables_beat_file_beats_defaults(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDLINE_TP", "4")
    monkeypatch.setenv("SHARDLINE_PP", "5")
    settings = load_settings({"config": str(config_file), "pp": "6"})
    assert (settings.pp, settings.tp, settings.max_num_seqs, settings.port) == (6, 4, 7, 8000)
    assert settings.model == "from-file"


def test_a_variable_may_name_the_file(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLINE_CONFIG", str(config_file))
    assert load_settings({}).pp == 3


def test_unknown_key_in_the_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "shardline.yaml"
    file.write_text("model: demo\nmax_model_length: 12\n")
    message = refusal({"config": str(file)})
    assert f"unknown key max_model_length in {file}; did you mean max_model_len?" in message


def test_unknown_variable_is_named_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLINE_MAX_NUM_SEQ", "3")
    message = refusal({"model": "demo"})
    assert "SHARDLINE_MAX_NUM_SEQ; did you mean SHARDLINE_MAX_NUM_SEQS?" in message


def test_a_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "shardline.yaml"
    reasons = {"model: [": "is not YAML", "- model\n- tp\n": "no mapping", "words\n": "no mapping"}
    assert f"cannot read the configuration file {file}" in refusal({"config": str(file)})
    for text, reason in reasons.items():
        file.write_text(text)
        assert f"{file} " in refusal({"config": str(file)})
        assert reason in refusal({"config": str(file)})


def test_a_wrong_value_is_told_by_the_name_it_was_set_with(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file.write_text("model: demo\nblock_size: 0\n")
    monkeypatch.setenv("SHARDLINE_TP", "0")
    message = refusal({"config": str(config_file), "max_num_seqs": "many"})
    assert f"block_size in {config_file}: input should be greater than or equal to 1" in message
    assert "SHARDLINE_TP: input should be greater than or equal to 1, not '0'" in message
    assert "--max-num-seqs: input should be a valid integer" in message


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ({"pp": 3, "stage_layers": "20,10"}, "names 2 stages and pp is 3"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "32 is below max_num_seqs 64"),
        ({"kv_memory": "1KiB", "num_kv_blocks": 9}, "1024 bytes and num_kv_blocks 9"),
        ({"port": 81, "grpc_port": 81}, "port and grpc_port are both 81"),
        ({"internal_host": "0.0.0.0"}, "internal_host 0.0.0.0 is not an address"),
        ({"iface": "lo", "internal_host": "127.0.0.1"}, "iface lo and internal_host 127.0.0.1"),
        (
            {"async_scheduling": True, "pp": 2, "max_in_flight": 2},
            "async_scheduling has 3 steps in flight and max_in_flight is 2; give one",
        ),
        ({"port": 65536}, "65536"),
        ({"kv_memory": "0"}, "greater than 0"),
    ],
)
def test_settings_that_cannot_work_together_are_refused_with_numbers(
    given: dict[str, object], numbers: str
) -> None:
    assert numbers in refusal({"model": "demo", **given})


def test_both_ports_may_be_free_ones() -> None:
    assert load_settings({"model": "demo", "port": 0, "grpc_port": 0}).port == 0


def test_no_model_is_refused() -> None:
    assert "shardline serve demo" in refusal({})


def test_sizes_and_lists_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLINE_API_KEY", "one,two")
    given = {"model": "demo", "pp": 2, "stage_layers": "20,10", "kv_memory": "2GiB"}
    settings = load_settings(given)
    assert settings.stage_layers == (20, 10)
    assert settings.kv_memory == 2 * 1024**3
    assert settings.api_key == ("one", "two")


def test_lists_from_a_file_are_lists(tmp_path: Path) -> None:
    file = tmp_path / "shardline.yaml"
    file.write_text("model: demo\npp: 2\nstage_layers: [20, 10]\napi_key: [a, 'b,c']\n")
    settings = load_settings({"config": str(file)})
    assert (settings.stage_layers, settings.api_key) == ((20, 10), ("a", "b,c"))


def test_budget_classes_come_from_file_variable_and_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "shardline.yaml"
    file.write_text("model: demo\nbudget_classes:\n  interactive: {ttft_ms: 1}\n")
    assert load_settings({} | {"config": str(file)}).budget_classes.interactive.ttft_ms == 1
    monkeypatch.setenv("SHARDLINE_BUDGET_CLASSES", '{"batch": {"deadline_ms": 2}}')
    classes = load_settings({"config": str(file)}).budget_classes
    assert (classes.batch.deadline_ms, classes.interactive.ttft_ms) == (2, 2000)
    given = {"model": "demo", "budget_classes": "{interactive: {tpot_ms: 3}}"}
    assert load_settings(given).budget_classes.interactive.tpot_ms == 3


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ("{urgent: {}}", "--budget-classes: urgent: extra inputs"),
        ("{batch: {ttft: 1}}", "--budget-classes: batch: ttft: extra inputs"),
        ("{batch: {ttft_ms: 0}}", "--budget-classes: batch: ttft_ms: input should be greater"),
        ("{batch: ", "is not YAML"),
    ],
)
def test_wrong_budget_classes_are_refused_by_name(classes: str, words: str) -> None:
    assert words in refusal({"model": "demo", "budget_classes": classes})


def test_keys_do_not_show_when_settings_are_printed() -> None:
    assert "hush" not in repr(load_settings({"model": "demo", "api_key": ("hush",)}))


def test_settings_are_frozen() -> None:
    settings: ServeSettings = load_settings({"model": "demo"})
    with pytest.raises(ValidationError):
        settings.tp = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("demo", "demo"),
        ("org/model-7b", "org/model-7b"),
        ("/models/llama-3.2", "llama-3.2"),
        ("./models/llama/", "llama"),
        ("files/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1"),
    ],
)
def test_served_name_follows_from_the_model(model: str, name: str) -> None:
    assert load_settings({"model": model}).model_name == name
    assert load_settings({"model": model, "served_model_name": "mine"}).model_name == "mine"


def test_an_interface_that_is_not_there_is_refused_with_those_that_are() -> None:
    from shardline_server.node_plan import find_address

    assert find_address("lo") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"--iface eth99: this node has .*\blo\b"):
        find_address("eth99")
