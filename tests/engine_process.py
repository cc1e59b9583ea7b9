"""A real engine with real workers, driven over its socket; for tests that need no door."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq

from shardline_scheduler.budget import LatencyBudget
from shardline_scheduler.plan import SamplingParams
from shardline_server.child import start_child_process, stop_child_processes
from shardline_server.engine_config import EngineAddress, EngineConfig
from shardline_server.engine_signals import LEAVE
from shardline_server.messages import (
    Abort,
    Delta,
    Drops,
    EngineFailed,
    EngineReady,
    EngineRecovering,
    EngineStats,
    FromEngine,
    Hello,
    Output,
    PipeStats,
    Submit,
    ToEngine,
)
from shardline_shards.channel import Endpoint, connect
from shardline_shards.gate import LaunchKeys
from shardline_shards.layout import ParallelLayout

TIMEOUT_MS = 120_000
UNLIMITED = LatencyBudget()


@dataclass
class Outcome:
    """What came of one request."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    deltas: list[Delta] = field(default_factory=list)


class EngineDied(Exception):
    pass


class EngineConnection:
    """One front end's view of an engine; waits for messages, never for time."""

    def __init__(self, engine: Endpoint, pid: int) -> None:
        self.pid = pid
        self.address = engine.address
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        connect(self._socket, engine)
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self.ready: object = None
        self.stats: EngineStats | None = None
        self.outcomes: dict[str, Outcome] = {}
        self.num_deltas: list[int] = []
        self.losses: list[str] = []
        self.drops: dict[str, int] = {}
        self.send(Hello())

    def send(self, message: ToEngine) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def submit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        budget: LatencyBudget = UNLIMITED,
    ) -> None:
        self.outcomes[request_id] = Outcome()
        self.send(Submit(request_id, list(token_ids), sampling, budget))

    def abort(self, request_id: str) -> None:
        self.send(Abort(request_id))

    def receive(self) -> EngineReady | EngineRecovering | Output:
        message: FromEngine | None = None
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        while message is None or isinstance(message, PipeStats | Drops):
            assert time.monotonic() < deadline, "the engine says nothing of any request"
            message = self.receive_any()
        return message

    def receive_any(self) -> EngineReady | EngineRecovering | Output | PipeStats | Drops:
        assert self._socket.poll(TIMEOUT_MS), "the engine says nothing"
        message = self._decoder.decode(self._socket.recv())
        if isinstance(message, EngineFailed):
            raise EngineDied(message.reason)
        if isinstance(message, EngineRecovering):
            self.losses.append(message.reason)
        if isinstance(message, Drops):
            self.drops = message.by_channel
        if isinstance(message, Output):
            self.stats = message.stats
            self.num_deltas.append(len(message.deltas))
            for delta in message.deltas:
                self._take(delta)
        return message

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is sent meanwhile is there at once when the engine goes on."""
        os.kill(self.pid, signal.SIGSTOP)
        yield
        os.kill(self.pid, signal.SIGCONT)

    def wait(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            self.receive()

    def generate(
        self, requests: dict[str, tuple[Sequence[int], SamplingParams]]
    ) -> dict[str, Outcome]:
        """Send all requests at once and wait for the end of each."""
        for request_id, (token_ids, sampling) in requests.items():
            self.submit(request_id, token_ids, sampling)
        self.wait(lambda: all(self.outcomes[name].finish_reason for name in requests))
        return {name: self.outcomes.pop(name) for name in requests}

    def _take(self, delta: Delta) -> None:
        outcome = self.outcomes[delta.request_id]
        assert outcome.finish_reason is None, "something came after the terminal record"
        assert delta.index == len(outcome.token_ids), "a token is lost or came twice"
        outcome.token_ids += delta.token_ids
        outcome.finish_reason = delta.finish_reason
        outcome.deltas.append(delta)

    def close(self) -> None:
        self._context.destroy(linger=0)


def engine_config(model: Path, layout: ParallelLayout, **overrides: object) -> EngineConfig:
    facts = json.loads((model / "config.json").read_text())
    settings: dict[str, object] = {
        "parent_pid": os.getpid(),
        "keys": LaunchKeys.create(),
        "host": "127.0.0.1",
        "model_path": str(model),
        "load_format": "auto",
        "layout": layout,
        "has_fixed_stages": True,
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
        "vocab_size": facts["vocab_size"],
        "max_model_len": min(2048, facts["max_position_embeddings"]),
        "max_num_seqs": 64,
        "max_num_batched_tokens": 256,
        "max_num_waiting": 256,
        "max_in_flight": None,
        "block_size": 16,
        "kv_memory_bytes": 512 << 20,
        "num_kv_blocks": None,
        "enable_prefix_caching": True,
        "threads_per_worker": 1,
        "log_level": "warning",
        "policy": "edf",
        "measure_s": 0.0,
        "cache_dir": str(model.parent / "cache"),
    }
    return EngineConfig(**(settings | overrides))  # type: ignore[arg-type]


def running_engine(
    model: Path, layout: ParallelLayout, **overrides: object
) -> AbstractContextManager[EngineConnection]:
    """An engine that is ready; afterwards it has left with status 0."""
    return running_engine_of(engine_config(model, layout, **overrides))


@contextmanager
def running_engine_of(config: EngineConfig) -> Iterator[EngineConnection]:
    """The same, of a whole configuration."""
    with started_engine(config) as (process, endpoint):
        connection = EngineConnection(endpoint, process.pid)
        try:
            connection.ready = connection.receive()
            assert isinstance(connection.ready, EngineReady)
            yield connection
            process.send_signal(LEAVE)
            assert process.wait(timeout=10) == 0
        finally:
            connection.close()


@contextmanager
def started_engine(config: EngineConfig) -> Iterator[tuple[subprocess.Popen[bytes], Endpoint]]:
    """An engine process and where it listens; afterwards it is ended, however it is by then."""
    process = start_child_process("shardline_server.engine", config)
    try:
        assert process.stdout is not None
        address = msgspec.json.decode(process.stdout.readline(), type=EngineAddress).address
        yield process, Endpoint(address=address, keys=config.keys.client)
    finally:
        process.kill()
        stop_child_processes([process])
