"""The image's health check against real doors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trustme
from tests.server.running import running_frontend

from shardline_server.door_config import DoorConfig, TlsFiles
from shardline_server.settings import ServeSettings

SCRIPT = Path(__file__).parents[2] / "deploy/healthcheck.py"
FIELDS = ServeSettings.model_fields.keys()


def check(host: str, port: int, **variables: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"SHARDLINE_HOST": host, "SHARDLINE_PORT": str(port)}
    env |= {name: str(path) for name, path in variables.items()}
    command = [sys.executable, str(SCRIPT)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_healthy_when_ready(running) -> None:
    for host in ("0.0.0.0", "127.0.0.1"):
        checked = check(host, running.addresses.http_port)
        assert (checked.returncode, '"ready"' in checked.stdout) == (0, True)


def test_unhealthy_once_the_engine_has_failed_and_when_nobody_listens(
    own_peer, tokenizer_folder
) -> None:
    with running_frontend(own_peer.endpoint, tokenizer_folder) as running:
        port = running.addresses.http_port
        running.loop.call_soon_threadsafe(running.frontend.fail, "broken on purpose")
        running.call(running.frontend.wait_failed())
        checked = check("127.0.0.1", port)
        assert (checked.returncode, "broken on purpose" in checked.stdout) == (1, True)
    gone = check("127.0.0.1", port)
    assert gone.returncode == 1 and f"no server at 127.0.0.1:{port}" in gone.stdout


@pytest.mark.parametrize("is_mutual", [False, True])
def test_healthy_behind_tls(peer, tokenizer_folder, tmp_path: Path, is_mutual: bool) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("shardline.example")
    cert, key, ca = (tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem"))
    issued.private_key_and_cert_chain_pem.write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    variables = {"SHARDLINE_TLS_CERT": cert, "SHARDLINE_TLS_KEY": key}
    if is_mutual:
        variables["SHARDLINE_TLS_CLIENT_CA"] = ca
    assert {name.removeprefix("SHARDLINE_").lower() for name in variables} <= FIELDS
    door = DoorConfig(tls=TlsFiles(cert=cert, key=key, client_ca=ca if is_mutual else None))
    with running_frontend(peer.endpoint, tokenizer_folder, door=door) as running:
        port = running.addresses.http_port
        assert check("0.0.0.0", port).returncode == 1
        checked = check("0.0.0.0", port, **variables)
        assert (checked.returncode, '"ready"' in checked.stdout) == (0, True)
