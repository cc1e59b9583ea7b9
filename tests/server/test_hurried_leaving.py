"""A server that is told more than once to leave, and what a server leaves behind."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from tests.engine_process import running_engine
from tests.server.test_serve import read_url, start
from tests.tiny import save_tiny

from shardline_server.engine_signals import LEAVE
from shardline_shards.layout import ParallelLayout


def test_a_second_signal_hurries_an_engine_and_breaks_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its workers do not react; what steps cost is kept nevertheless."""
    layout = ParallelLayout(tp=1, stage_layers=(2, 1))
    with running_engine(save_tiny("llama", tmp_path / "model"), layout, measure_s=0.5) as engine:
        (costs,) = (tmp_path / "cache" / "step-costs").iterdir()
        costs.unlink()
        for worker in psutil.Process(engine.pid).children():
            worker.suspend()
        os.kill(engine.pid, LEAVE)
        while not costs.exists():
            time.sleep(0.01)
        os.kill(engine.pid, LEAVE)
        os.kill(engine.pid, LEAVE)
    assert "Traceback" not in capfd.readouterr().err
    assert costs.exists()


@pytest.mark.parametrize("is_killed", [False, True], ids=["leaves", "is killed"])
def test_a_server_leaves_no_process_and_no_shared_memory(tiny_model: Path, is_killed: bool) -> None:
    """What shards share has no name in /dev/shm, neither then nor later."""
    before = set(os.listdir("/dev/shm"))
    process = start(tiny_model, "--tp", "2", "--dtype", "float32")
    read_url(process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    mapped = {mapping.path for one in family for mapping in one.memory_maps()}
    assert any("memfd:shardline-collectives" in path for path in mapped)
    assert not [path for path in mapped if path.startswith("/dev/shm")]
    process.send_signal(signal.SIGKILL if is_killed else signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert set(os.listdir("/dev/shm")) <= before
    assert is_killed or "Traceback" not in errors
