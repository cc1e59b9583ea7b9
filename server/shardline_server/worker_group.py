"""The engine's workers: started, brought together, fed with plans, watched."""

import logging
from collections.abc import Iterator
from typing import TypeVar

import zmq

from shardline_scheduler.plan import StepPlan, StepResult
from shardline_server.engine_config import EngineConfig
from shardline_server.errors import ConfigError
from shardline_server.head import Head
from shardline_server.local_workers import LocalWorkers
from shardline_shards.layout import Place
from shardline_shards.messages import (
    Allocate,
    Failed,
    FromWorker,
    Joined,
    Loaded,
    Ready,
    Rendezvous,
    StageReport,
    Stop,
    ToWorker,
    WorkerConfig,
    decode_from_worker,
    encode,
)

logger = logging.getLogger("shardline.engine")

_Message = TypeVar("_Message", Joined, Loaded, Ready)

_CHECK_INTERVAL_MS = 200
_DEATH_TAKES_S = 0.3


class WorkerFailed(Exception):
    """A worker ended or said that it must; `is_refusal` if the operator can mend it."""

    def __init__(self, reason: str, *, is_refusal: bool = False) -> None:
        super().__init__(reason)
        self.is_refusal = is_refusal


class WorkerGroup:
    """All workers of one engine, on one control socket."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.set_hwm(0)
        self.socket.bind(f"tcp://{config.host}:*")
        self._address: str = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._local = LocalWorkers()
        self._head = None if config.nodes is None else Head(config, config.nodes)

    def start(self) -> int:
        """Start every worker and wait until all are ready; returns the number of KV blocks.

        Raises WorkerFailed.
        """
        places = self.config.layout.places()
        configs = [self._worker_config(place) for place in places]
        if self._head is not None:
            configs = self._assign(self._head, configs)
        self._local.start(configs, self.config.threads_per_worker)
        joined = self._collect(Joined)
        store_port = next((message.store_port for message in joined if message.store_port), 0)
        self._send_all(Rendezvous(self.config.host, store_port))
        loaded = self._collect(Loaded)
        num_blocks = self._agree_on_blocks(loaded)
        self._send_all(Allocate(num_blocks))
        self._collect(Ready)
        return num_blocks

    def submit(self, plan: StepPlan) -> None:
        """Send a plan to every worker."""
        self._send_all(plan)

    def results(self) -> Iterator[StepResult | StageReport]:
        """What has arrived; raises WorkerFailed if a worker says that it fails."""
        while self.socket.poll(0):
            message = self._receive()
            assert isinstance(message, StepResult | StageReport)
            yield message

    def check(self) -> None:
        """Raise WorkerFailed if a worker process has ended, or a node has fallen silent."""
        failure = self._local.find_ended()
        if failure is None and self._head is not None:
            failure = self._head.watch.find_failure()
        if failure is not None:
            self._raise_last_words()
            raise WorkerFailed(failure)

    def stop(self) -> None:
        """Tell all workers to leave, and see that they do."""
        self._send_all(Stop())
        self._dismiss_nodes()
        self._local.join()
        self.socket.close(linger=0)

    def kill(self) -> None:
        """End all workers at once."""
        self._dismiss_nodes()
        self._local.kill()
        self.socket.close(linger=0)

    def _assign(self, head: Head, configs: list[WorkerConfig]) -> list[WorkerConfig]:
        try:
            return head.assign(configs)
        except ConfigError as error:
            raise WorkerFailed(str(error), is_refusal=True) from error

    def _dismiss_nodes(self) -> None:
        if self._head is not None:
            self._head.watch.dismiss()

    def _worker_config(self, place: Place) -> WorkerConfig:
        """What a worker is told; the node that starts it fills in its cores and memory."""
        config = self.config
        return WorkerConfig(
            engine_address=self._address,
            host=config.host,
            layout=config.layout,
            place=place,
            model_path=config.model_path,
            load_format=config.load_format,
            dtype=config.dtype,
            device=config.device,
            seed=config.seed,
            block_size=config.block_size,
            kv_memory_bytes=config.kv_memory_bytes,
            max_kv_blocks=self._max_useful_blocks(),
            log_level=config.log_level,
        )

    def _max_useful_blocks(self) -> int:
        """Twice what the most and longest requests can fill; more would only slow the start."""
        config = self.config
        if config.num_kv_blocks is not None:
            return config.num_kv_blocks
        return 2 * config.max_num_seqs * -(-config.max_model_len // config.block_size)

    def _agree_on_blocks(self, loaded: list[Loaded]) -> int:
        """The smallest of what each rank has room for: every rank holds every sequence's blocks."""
        for message in sorted(loaded, key=lambda message: message.rank):
            logger.info(
                "%s: read %.1f of %.1f MB, room for %d KV blocks of %.1f kB, attention: %s",
                self.config.layout.place(message.rank),
                message.read_bytes / 1e6,
                message.total_bytes / 1e6,
                message.num_kv_blocks,
                message.kv_block_bytes / 1e3,
                message.attention,
            )
        smallest = min(loaded, key=lambda message: message.num_kv_blocks)
        num_blocks, wanted = smallest.num_kv_blocks, self.config.num_kv_blocks
        place = self.config.layout.place(smallest.rank)
        if num_blocks < 1 or (wanted is not None and num_blocks < wanted):
            raise WorkerFailed(
                f"KV memory: {place} has room for {num_blocks} blocks of "
                f"{smallest.kv_block_bytes} bytes, {wanted or 1} are needed; "
                "give more by --kv-memory or ask for less by --num-kv-blocks",
                is_refusal=True,
            )
        return num_blocks

    def _collect(self, kind: type[_Message]) -> list[_Message]:
        """One message of a kind from every worker."""
        messages: list[_Message] = []
        while len(messages) < self.config.layout.world_size:
            if self.socket.poll(_CHECK_INTERVAL_MS):
                message = self._receive()
                assert isinstance(message, kind), message
                messages.append(message)
            self.check()
        return messages

    def _receive(self) -> FromWorker:
        message: FromWorker = decode_from_worker(self.socket.recv_multipart()[1])
        if isinstance(message, Failed):
            raise self._explain(message)
        return message

    def _explain(self, message: Failed) -> WorkerFailed:
        """Why a worker fails: a rank that was killed breaks its neighbours' connections, and they
        may say so before its process has quite ended.
        """
        if message.is_refusal:
            return WorkerFailed(message.reason, is_refusal=True)
        reporter = self.config.layout.place(message.rank)
        reason = f"{reporter} failed: {message.reason}"
        killed = self._local.find_killed(besides=reporter, within_s=_DEATH_TAKES_S)
        return WorkerFailed(f"{killed}; {reason}" if killed else reason)

    def _raise_last_words(self) -> None:
        """A worker that fails says so before it ends; prefer its reason to its exit status."""
        while self.socket.poll(0):
            self._receive()

    def _send_all(self, message: ToWorker) -> None:
        payload = encode(message)
        for rank in range(self.config.layout.world_size):
            self.socket.send_multipart([str(rank).encode(), payload])
