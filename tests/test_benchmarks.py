"""Scripts in `bench/`: what they say where other servers, or a GPU, are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_tiny

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.parametrize(
    ("script", "which", "key"),
    [("peers.py", "--servers", "servers"), ("budgets.py", "--policies", "policies")],
)
def test_a_missing_server_is_said_to_be_missing(tmp_path, script, which, key):
    model = save_tiny("llama", tmp_path / "model")
    peers, out = tmp_path / "peers", tmp_path / "out"
    command = [sys.executable, BENCH / script, model, "--out", out, "--peers", peers]
    command += [which, "vllm 2 threads", "llama.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{peers / 'vllm/bin/vllm'} is not there" in done.stdout
    name = script.removesuffix(".py")
    results = json.loads((out / f"{name}.json").read_text())[key]
    assert set(results["llama.cpp"]) == {"missing"}
    assert (out / f"{name}.md").read_text() == done.stdout.removesuffix("\n")
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_memory_is_counted_over_the_process_tree():
    """A child's own 64 MiB count, through a shell between."""
    hold = "data = b'x' * 2**26; print(flush=True); input()"
    script = "import sys, subprocess; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", script, hold]
    count = f"import sys; sys.path.insert(0, {str(BENCH)!r}); import servers; "
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        counted = subprocess.run(
            [sys.executable, "-c", f"{count} print(servers.tree_bytes({process.pid}))"],
            capture_output=True,
            text=True,
        )
        process.communicate(b"\n")
    assert 2**26 < int(counted.stdout) < 2**28


def test_what_measures_a_gpu_runs_on_a_cpu_and_says_what_it_leaves_out():
    command = [sys.executable, BENCH / "gpu.py", "tiny", "--device", "cpu", "--kernels"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sampling: the tokens that a CPU draws" in done.stdout
    assert "continuous batching: not run, it wants a GPU" in done.stdout


def test_without_a_gpu_nothing_is_measured_as_if_there_were_one():
    command = [sys.executable, BENCH / "gpu.py", "tiny"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "there is no GPU here" in done.stderr
