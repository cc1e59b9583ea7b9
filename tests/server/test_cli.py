import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from shardline_server.cli import main
from shardline_server.options import given_settings, settings_parameters
from shardline_server.settings import ServeSettings, load_settings

HEAVY = ("torch", "transformers", "fastapi", "grpc", "huggingface_hub", "numpy")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def parse(*arguments: str) -> ServeSettings:
    """The settings that `shardline serve` with these arguments would start with."""
    command = main.commands["serve"]
    with command.make_context("serve", list(arguments)) as context:
        return load_settings(given_settings(context.params))


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["version"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from shardline_server.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        f"sys.exit(repr([m for m in {HEAVY!r} if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip() == "''"


def test_help_names_every_setting() -> None:
    text = run("serve", "--help").output
    assert text.startswith("Usage:")
    for name in ServeSettings.model_fields.keys() - {"model"}:
        assert f"--{name.replace('_', '-')}" in text
    assert "MODEL is a folder" in text


def test_the_last_of_repeated_flags_counts() -> None:
    settings = parse("demo", "--pp", "2", "--tp", "2", "--pp", "1")
    assert (settings.tp, settings.pp) == (2, 1)


def test_flags_that_vllm_users_know() -> None:
    settings = parse(
        *("demo", "--tensor-parallel-size", "2", "--pipeline-parallel-size=3"),
        *("--max-num-seqs", "4", "--max-num-batched-tokens", "512", "--max-model-len", "100"),
        *("--served-model-name", "m", "--dtype", "float16", "--block-size", "32"),
        *("--host", "0.0.0.0", "--port", "1", "--load-format", "dummy"),
        *("--no-enable-prefix-caching", "--api-key", "a,b", "--api-key", "[c"),
    )
    assert (settings.tp, settings.pp, settings.max_model_len) == (2, 3, 100)
    assert settings.enable_prefix_caching is False
    assert settings.api_key == ("a,b", "[c")


def test_flags_are_few_words_for_each_setting() -> None:
    names = [name for parameter in settings_parameters() for name in parameter.opts]
    assert len(names) == len(set(names))


def test_unknown_flag_is_named_with_the_nearest() -> None:
    done = run("serve", "demo", "--max-model-length", "5")
    assert done.exit_code == 2
    assert "'--max-model-length'" in done.stderr
    assert "--max-model-len" in done.stderr.split("Did you mean")[1]


def test_operators_mistakes_end_in_one_line_and_status_2(tmp_path: object) -> None:
    for arguments in (["serve", "demo", "--tp", "0"], ["pull", f"{tmp_path}/none"], ["serve"]):
        done = run(*arguments)
        assert done.exit_code == 2
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr


def test_version_names_the_libraries() -> None:
    lines = run("version").output.splitlines()
    assert [line.split()[0] for line in lines] == ["shardline", "torch", "transformers"]


def test_pull_prints_the_folder_alone(demo_model: object) -> None:
    command = [sys.executable, "-m", "shardline_server", "pull", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{demo_model}\n"
