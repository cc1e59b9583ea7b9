"""A real server as a process with both doors, and a front end before a scripted engine."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.clients.bad_servers import BadServer, GrpcBadServer, HttpBadServer
from tests.clients.kinds import KINDS, Asked
from tests.server.conftest import build_tokenizer
from tests.server.peer import EnginePeer
from tests.server.running import RunningFrontend, running_frontend
from tests.tiny import save_tiny

from shardline_server.door_config import DoorConfig

DOORS = ("http", "grpc")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("tiny-llama"), vocab_size=400)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(tiny_model: Path) -> Iterator[dict[str, str]]:
    """The addresses of `shardline serve` with two stages in fp32, one for each door."""
    command = [sys.executable, "-m", "shardline_server", "serve", str(tiny_model), "--pp", "2"]
    command += ["--dtype", "float32", "--served-model-name", "tiny", "--num-kv-blocks", "512"]
    command += ["--threads-per-worker", "1", "--port", "0", "--grpc-port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found: dict[str, str] = {}
    for line in process.stdout:
        if match := re.match(r"  (HTTP|gRPC)  (?:http://)?([\d.:]+)", line):
            door = match[1].lower()
            found[door] = f"{door}://{match[2]}"
        if len(found) == len(DOORS):
            break
    yield found
    process.terminate()
    process.communicate()
    assert process.returncode == 0


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(server: dict[str, str], door: str) -> str:
    return server[door]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_client(kind: str) -> Iterator[Callable[..., Asked]]:
    """A client of one kind, closed at the end of the test."""
    with ExitStack() as stack:
        yield lambda url, **options: stack.enter_context(KINDS[kind](url, **options))


@pytest.fixture
def client(make_client: Callable[..., Asked], url: str) -> Asked:
    """Of the real server."""
    return make_client(url)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def peer() -> Iterator[EnginePeer]:
    """A scripted engine, which shows what reaches an engine."""
    peer = EnginePeer()
    yield peer
    peer.stop()


@pytest.fixture
def frontend(peer: EnginePeer, tokenizer_folder: Path) -> Iterator[RunningFrontend]:
    with running_frontend(
        peer.endpoint, tokenizer_folder, door=DoorConfig(api_keys=("right",))
    ) as running:
        yield running


@pytest.fixture
def frontend_url(frontend: RunningFrontend, door: str) -> str:
    addresses = frontend.addresses
    return addresses.http_url if door == "http" else f"grpc://{addresses.grpc_target}"


@pytest.fixture
def bad_server(door: str) -> Iterator[BadServer]:
    """Answers what the test tells it to."""
    kind = HttpBadServer if door == "http" else GrpcBadServer
    with kind() as server:
        yield server
