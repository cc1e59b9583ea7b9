"""The image's health check against real doors."""

import os
import subprocess
import sys
from pathlib import Path

from tests.server.running import running_frontend

SCRIPT = Path(__file__).parents[2] / "deploy/healthcheck.py"


def check(host: str, port: int) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"SHARDLINE_HOST": host, "SHARDLINE_PORT": str(port)}
    command = [sys.executable, str(SCRIPT)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_healthy_when_ready(running) -> None:
    for host in ("0.0.0.0", "127.0.0.1"):
        checked = check(host, running.addresses.http_port)
        assert (checked.returncode, '"ready"' in checked.stdout) == (0, True)


def test_unhealthy_once_the_engine_has_failed_and_when_nobody_listens(
    own_peer, tokenizer_folder
) -> None:
    with running_frontend(own_peer.address, tokenizer_folder) as running:
        port = running.addresses.http_port
        running.loop.call_soon_threadsafe(running.frontend.fail, "broken on purpose")
        running.call(running.frontend.wait_failed())
        checked = check("127.0.0.1", port)
        assert (checked.returncode, "broken on purpose" in checked.stdout) == (1, True)
    gone = check("127.0.0.1", port)
    assert gone.returncode == 1 and f"no server at 127.0.0.1:{port}" in gone.stdout
