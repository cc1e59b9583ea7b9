"""`shardline plan` says what `serve` then does, and measures only what nobody has measured."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.engine_process import running_engine_of

from shardline_server.messages import EngineReady
from shardline_server.plan.command import find_plan
from shardline_server.settings import load_settings


def plan(model: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardline_server", "plan", str(model), "--cache", str(cache)]
    options = ["--dtype", "float32", "--max-model-len", "128", "--threads-per-worker", "1"]
    options += ["--measure-seconds", "1", *arguments]
    return subprocess.run([*command, *options], capture_output=True, text=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def first(tiny_model: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    return plan(tiny_model, cache, "--pp", "2", "--kv-memory", "1MiB", "--explain")


def test_what_nobody_has_measured_is_measured_by_real_workers(first) -> None:
    assert first.returncode == 0, first.stderr
    assert "no start before this one" in first.stderr
    assert "counted by the workers" in first.stdout
    stages = re.findall(r"^ stage (\d) +([\d.]+) \(([\d.]+)\) +([\d.]+)", first.stdout, re.M)
    assert [stage for stage, *_ in stages] == ["0", "1"]
    assert all(float(time) >= 0 for _, *times in stages for time in times)


def test_explain_prints_every_coefficient_with_its_unit_for_each_stage(first) -> None:
    names = ("a: each step", "b: a prompt token", "c: a decode", "d: its context", "e: a prompt")
    for name, unit in zip(names, ("ms", "us", "us", "ns", "ns"), strict=True):
        rows = re.findall(rf"^ {name}.*?(?:\d\.\d+ (\w+)|not yet known)", first.stdout, re.M)
        assert len(rows) == 2 and set(rows) <= {unit, ""}
    assert len(re.findall(r"up to \d+ tokens +above \d+ tokens", first.stdout)) == 2
    for kind in ("with prompts", "of decodes only"):
        margins = re.findall(rf"nine of ten steps {kind} take +(up to [+-]\d|not)", first.stdout)
        assert len(margins) == 2


def test_the_second_time_it_is_told_from_the_cache_and_says_the_same(
    first, tiny_model: Path, cache: Path
) -> None:
    second = plan(tiny_model, cache, "--pp", "2", "--kv-memory", "1MiB", "--explain")
    assert second.returncode == 0, second.stderr
    assert "measuring" not in second.stderr
    estimated = second.stdout.replace("estimated from what is free", "counted by the workers")
    assert estimated == first.stdout


def test_a_server_then_has_the_stages_and_the_memory_that_were_planned(
    first, tiny_model: Path, cache: Path
) -> None:
    given = {
        "pp": 2,
        "kv_memory": "1MiB",
        "dtype": "float32",
        "max_model_len": 128,
        "measure_seconds": 1,
    }
    settings = load_settings(
        {"model": str(tiny_model), "cache": str(cache), "threads_per_worker": 1, **given}
    )
    planned = find_plan(settings)
    assert not planned.is_counted
    with running_engine_of(planned.config) as engine:
        assert isinstance(engine.ready, EngineReady)
        assert engine.ready.num_kv_blocks == planned.num_blocks


def test_the_placement_over_nodes_is_told_without_any_of_them(
    tiny_model: Path, cache: Path
) -> None:
    """Layers go to where there is memory for them, and a node that may run more gets more."""
    split = ["--nodes", "2", "--pp", "3", "--stage-layers", "1,1,1"]
    done = plan(tiny_model, cache, *split, "--node-gpus", "1,2", "--node-memory", "4GiB,2GiB")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ (\d) +\d+ cores, ([\d.]+) GB free +(\d) +(\d) +(\d) ", done.stdout, re.M)
    assert rows == [
        ("0", "4.3", "0", "0", "0"),
        ("1", "2.1", "1", "1", "1"),
        ("1", "2.1", "2", "2", "2"),
    ]
    tight = plan(tiny_model, cache, *split, "--node-memory", "4GiB,1KiB")
    assert tight.returncode == 2 and "do not fit --pp 3" in tight.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nodes", "3"],
        ["--nodes", "2", "--pp", "2", "--node-memory", "1GiB"],
        ["--nodes", "2", "--pp", "2", "--node-memory", "1GiB,much"],
        ["--node-memory", "1GiB"],
        ["--pp", "99"],
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    tiny_model: Path, cache: Path, arguments: list[str]
) -> None:
    done = plan(tiny_model, cache, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


def test_nothing_is_measured_where_that_is_not_wanted(tiny_model: Path, tmp_path: Path) -> None:
    done = plan(tiny_model, tmp_path, "--measure-seconds", "0", "--num-kv-blocks", "64")
    assert done.returncode == 0, done.stderr
    assert "--measure-seconds 0" in done.stdout and "64 are asked for" in done.stdout
    assert not (tmp_path / "step-costs").exists()
