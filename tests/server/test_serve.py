"""`shardline serve` as a process: how it starts, how it refuses to, and what it leaves behind."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from shardline_server.errors import ConfigError
from shardline_server.model_facts import read_model_facts

WEIGHTS = "model.safetensors"
LONG = {"prompt": [5, 6, 7], "max_tokens": 500, "ignore_eos": True, "stream": True}
SHORT = {"max_tokens": 2, "stream": False}
FREE_PORTS = ("--port", "0", "--grpc-port", "0")


def start(model: Path, *options: str, start_new_session: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "shardline_server", "serve", str(model), *FREE_PORTS, *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
    )


def read_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"http://[\d.:]+", line):
            return match[0]
    raise AssertionError(f"no URL, but: {process.communicate()[1]}")


def refusal(model: Path, *options: str) -> str:
    """The last line of a start that fails; it has status 2, and nothing else is left running."""
    process = start(model, *options)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    return errors.strip().splitlines()[-1]


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


@pytest.fixture
def serving(tiny_model: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process], str]]:
    """A server with two stages, its processes, and its URL."""
    process = start(tiny_model, "--pp", "2", "--dtype", "float32")
    url = read_url(process)
    children = psutil.Process(process.pid).children(recursive=True)
    yield process, children, url
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_with_status_0(serving, number: signal.Signals) -> None:
    process, children, url = serving
    assert [name for name in map(process_name, children) if "shardline" in name] == [
        "shardline: engine",
        "shardline: worker stage=0 tp=0",
        "shardline: worker stage=1 tp=0",
    ]
    body = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(number)
        last = [line for line in lines if line][-1]
    assert last == "data: [DONE]" or '"error"' in last
    assert process.wait(timeout=20) == 0
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert len(gone) == 3


def process_name(process: psutil.Process) -> str:
    """What it calls itself; nothing if it has just ended, as what measures layers does."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.NoSuchProcess:
        return ""


def test_a_signal_while_workers_load_ends_everything(tiny_model: Path) -> None:
    process = start(tiny_model, "--pp", "2")
    try:
        server, workers = psutil.Process(process.pid), []
        while len(workers) < 2:
            children = server.children(recursive=True)
            workers = [child for child in children if "worker" in process_name(child)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_an_address_of_another_host(tiny_model: Path) -> None:
    assert "192.0.2.1 is no address of this host" in refusal(
        tiny_model, "--internal-host", "192.0.2.1"
    )


def test_nothing_outlives_a_killed_server(serving) -> None:
    process, children, _ = serving
    process.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_a_killed_engine_is_replaced_and_its_streams_are_told(serving) -> None:
    _, children, url = serving
    engine, *workers = children
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        engine.kill()
        *_, last = [line for line in lines if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert "signal 9" in error["message"]
    assert error["retry_after_s"] > 0
    refusal = httpx.post(f"{url}/v1/completions", json={"prompt": [5]}, timeout=60)
    assert (refusal.status_code, "Retry-After" in refusal.headers) == (503, True)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    while httpx.get(f"{url}/ready", timeout=60).status_code != 200:
        time.sleep(0.1)
    assert httpx.post(f"{url}/v1/completions", json=LONG | SHORT, timeout=60).status_code == 200
    assert "signal 9" in httpx.get(f"{url}/health").json()["last_loss"]


def test_a_worker_that_keeps_dying_ends_the_server(tiny_model: Path) -> None:
    process = start(tiny_model, "--pp", "2", "--dtype", "float32")
    url = read_url(process)
    for _ in range(3):
        children = psutil.Process(process.pid).children(recursive=True)
        next(child for child in children if "stage=0" in process_name(child)).kill()
        with contextlib.suppress(httpx.TransportError):
            while httpx.get(f"{url}/ready", timeout=60).status_code == 200:
                time.sleep(0.01)
            while httpx.get(f"{url}/ready", timeout=60).status_code != 200:
                time.sleep(0.1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    line = next(line for line in errors.splitlines() if "The server ends" in line)
    assert "3 times in" in line
    assert "stage 0, tp rank 0 was killed by signal 9" in line


@pytest.mark.parametrize(
    ("grace", "number_of_signals", "last"),
    [("60", 1, "[DONE]"), ("0", 1, "shutting down"), ("60", 2, "shutting down")],
)
def test_leaving(tiny_model: Path, grace: str, number_of_signals: int, last: str) -> None:
    process = start(tiny_model, "--pp", "2", "--dtype", "float32", "--grace-s", grace)
    url = read_url(process)
    with (
        httpx.Client(base_url=url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=LONG | {"n": 8}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        if grace != "0":
            while (ready := client.get("/ready")).status_code == 200:
                time.sleep(0.01)
            assert (ready.status_code, "Retry-After" in ready.headers) == (503, True)
            refusal = client.post("/v1/completions", json=LONG)
            assert (refusal.status_code, "Retry-After" in refusal.headers) == (503, True)
        for _ in range(1, number_of_signals):
            process.send_signal(signal.SIGTERM)
        assert last in [line for line in lines if line][-1]
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors


def test_more_stages_than_layers(tiny_model: Path) -> None:
    assert "--pp 4 is more than the model's 3 layers" in refusal(tiny_model, "--pp", "4")


def test_more_shards_than_heads(tiny_model: Path) -> None:
    assert "--tp 7 is more than the model's 6 query heads" in refusal(tiny_model, "--tp", "7")


def test_stages_that_do_not_add_up(tiny_model: Path) -> None:
    line = refusal(tiny_model, "--pp", "2", "--stage-layers", "1,1")
    assert "1 + 1 = 2 layers, but the model has 3" in line


def test_longer_than_the_model_was_made_for(tiny_model: Path) -> None:
    assert "more than the 512 tokens" in refusal(tiny_model, "--max-model-len", "9999")


def test_too_little_kv_memory(tiny_model: Path) -> None:
    line = refusal(tiny_model, "--kv-memory", "1KiB")
    assert "room for 0 blocks" in line
    assert "--kv-memory" in line


def test_no_gpu(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    from shardline_server.engine_launch import choose_device

    assert choose_device("auto", 1) == "cpu"
    with pytest.raises(ConfigError, match="2 workers need a GPU each, this host has 0"):
        choose_device("cuda", 2)


def test_steps_are_planned_ahead_as_asked_else_where_it_pays() -> None:
    from shardline_server.engine_launch import choose_plans_ahead
    from shardline_server.settings import ServeSettings

    plain = ServeSettings(model="demo")
    stages = ServeSettings(model="demo", pp=2)
    assert [choose_plans_ahead(plain, device) for device in ("cpu", "cuda")] == [False, True]
    assert [choose_plans_ahead(stages, device) for device in ("cpu", "cuda")] == [True, False]
    assert choose_plans_ahead(ServeSettings(model="demo", async_scheduling=True), "cpu")
    assert not choose_plans_ahead(ServeSettings(model="demo", async_scheduling=False), "cuda")
    assert not choose_plans_ahead(ServeSettings(model="demo", pp=2, max_in_flight=2), "cpu")
    assert not choose_plans_ahead(ServeSettings(model="demo", max_in_flight=1), "cuda")


def test_blocks_are_pages_on_cuda() -> None:
    from shardline_server.engine_launch import choose_block_size

    assert choose_block_size(None, "cpu") == 16
    assert choose_block_size(None, "cuda") == 256
    with pytest.raises(ConfigError, match="multiple of 256"):
        choose_block_size(16, "cuda")


def test_attention_that_is_not_served_is_refused_at_start(copied: Path) -> None:
    """Phimoe-like: a window that only the mask knows about, so attention refuses at first use."""
    edit_config(copied, sliding_window=8)
    assert "through its mask" in refusal(copied)


@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_a_port_in_use(tiny_model: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refusal(tiny_model, option, port)
    assert f"127.0.0.1:{port}" in line
    assert "another port" in line


def test_a_truncated_file(copied: Path) -> None:
    content = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert WEIGHTS in refusal(copied)


def test_a_missing_shard_file(copied: Path) -> None:
    (copied / WEIGHTS).unlink()
    index = {"weight_map": {"model.norm.weight": "part-1.safetensors"}}
    (copied / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "part-1.safetensors" in refusal(copied)


def test_a_missing_tensor_is_found_by_the_worker(copied: Path) -> None:
    edit_config(copied, num_hidden_layers=4)
    assert "has no tensor 'model.layers.3." in refusal(copied)


def test_an_unknown_class(copied: Path) -> None:
    edit_config(copied, architectures=["UnheardOfForCausalLM"])
    assert "'UnheardOfForCausalLM'" in refusal(copied)


def test_a_config_without_the_numbers(copied: Path) -> None:
    edit_config(copied, num_hidden_layers=None)
    with pytest.raises(ConfigError, match="does not say num_hidden_layers"):
        read_model_facts(copied)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
