"""The engine's workers: started, brought together, fed with plans, watched."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import zmq

from shardline_scheduler.plan import StepPlan, StepResult
from shardline_server.engine_config import EngineConfig
from shardline_server.errors import ConfigError
from shardline_server.forming_watch import FormingWatch
from shardline_server.head import Head
from shardline_server.local_workers import Death
from shardline_server.step_watch import StepWatch, find_divergence, find_stuck
from shardline_server.wires import Wires
from shardline_server.worker_placement import place_alone
from shardline_server.workforce import Workforce
from shardline_shards.gate import Gate, Listener
from shardline_shards.layout import Place
from shardline_shards.messages import (
    Allocate,
    Dropped,
    Failed,
    FromWorker,
    Joined,
    Loaded,
    Lost,
    Ready,
    Reform,
    Rendezvous,
    StageReport,
    Stop,
    ToWorker,
    WorkerConfig,
    decode_from_worker,
    encode,
    worker_name,
)

logger = logging.getLogger("shardline.engine")

_CHECK_INTERVAL_MS = 200
_DEATH_TAKES_S = 0.3


class WorkerFailed(Exception):
    """The workers cannot go on; `is_refusal` if the operator can mend it."""

    def __init__(self, reason: str, *, is_refusal: bool = False) -> None:
        super().__init__(reason)
        self.is_refusal = is_refusal


class WorkerLost(WorkerFailed):
    """Workers are dead, or held dead; without `places` only connections between them broke.

    `request_indexes` are of the requests whose step they died in.
    """

    def __init__(
        self, places: Sequence[Place], reason: str, request_indexes: Sequence[int] = ()
    ) -> None:
        super().__init__(reason)
        self.places = tuple(places)
        self.request_indexes = tuple(request_indexes)


class WorkerGroup:
    """All workers of one engine: this node's each on a wire, those of other nodes on one socket.

    The group has a generation number, one more for every time that workers were lost and the rest
    was re-formed with new ones. Messages from before that are dropped.
    """

    def __init__(self, config: EngineConfig, gate: Gate) -> None:
        self.config = config
        self.generation = 0
        self._listener = Listener(gate, config.host, decode_from_worker)
        self._wires = Wires(decode_from_worker)
        self.sources: list[Any] = [self._wires.fileno(), self._listener.socket]
        self._head = None if config.nodes is None else Head(config, config.nodes, gate)
        watch = None if self._head is None else self._head.watch
        self._workforce = Workforce(watch, self._wires)
        self._ranks = range(config.layout.world_size)
        self._names = [worker_name(rank, 0) for rank in self._ranks]
        self._loaded: dict[int, Loaded] = {}
        self._joined: dict[int, Joined] = {}
        self._ready: set[int] = set()
        self._num_blocks: int | None = None
        self._first_step_id: int | None = None
        self._forming = FormingWatch((), time.monotonic(), steps_s=0.0)
        self._steps = StepWatch()
        self._dropped_by_workers: Counter[str] = Counter(worker=0, tensor=0)
        self._num_impostures = 0

    def start(self) -> int:
        """Start every worker and wait until all are ready; returns the number of KV blocks.

        Raises WorkerFailed.
        """
        self._workforce.local.start(self._place(), self.config.threads_per_worker)
        self._bring_together()
        assert self._num_blocks is not None
        return self._num_blocks

    def reform(self, loss: WorkerLost, steps_s: float) -> None:
        """Start lost workers again, and bring all together, without any request.

        The others keep their weights; they may still be in steps that should take `steps_s`.
        Raises WorkerLost if more are lost meanwhile.
        """
        self.generation += 1
        self._joined.clear()
        self._ready.clear()
        self._first_step_id = None
        self._steps.forget()
        self._workforce.restart(loss.places, self.generation)
        for place in loss.places:
            rank = self.config.layout.rank(place)
            self._names[rank] = worker_name(rank, self.generation)
            self._loaded.pop(rank, None)
        self._send_all(Reform(self.generation))
        survivors = [self.config.layout.place(rank) for rank in self._loaded]
        self._forming = FormingWatch(survivors, time.monotonic(), steps_s)
        self._bring_together()

    def submit(self, plan: StepPlan) -> None:
        """Send a plan to every worker."""
        if self._first_step_id is None:
            self._first_step_id = plan.step_id
        self._steps.submit(plan, time.monotonic())
        self._send_all(plan)

    def poll(self, timeout_ms: int) -> bool:
        """Wait so long at most until a worker has said something; whether one has."""
        ready, _, _ = zmq.select(self.sources, [], [], timeout_ms / 1000)
        return bool(ready)

    @property
    def has_unread(self) -> bool:
        """Whether there is something to receive that `sources` do not know of any more."""
        return self._wires.has_unread

    def results(self) -> Iterator[StepResult | StageReport]:
        """What has arrived; raises WorkerLost if a worker says that it fails."""
        while (received := self._receive()) is not None:
            message = self._accept(*received)
            if isinstance(message, StepResult | StageReport) and self._is_current(message):
                if isinstance(message, StepResult):
                    self._arrive(message.step_id)
                yield message

    def check_hang(self, expected_s: float) -> None:
        """Raise WorkerLost if a result is overdue; plans in flight should take `expected_s`."""
        step_id = self._steps.overdue(expected_s, time.monotonic())
        if step_id is None:
            return
        entries = self._workforce.entries()
        places = self._workforce.find_stopped() or find_stuck(entries, step_id)
        names = ", ".join(f"{place} ({entries[place] or 'no step yet'})" for place in places)
        reason = f"step {step_id} takes far longer than predicted; held dead: {names}"
        raise WorkerLost(places, reason, self._steps.requests_of(step_id))

    def check(self) -> None:
        """Raise WorkerLost if a worker process has ended, WorkerFailed if a node is silent, or
        leaves before all have loaded.
        """
        if failure := self._workforce.find_silent():
            self._raise_last_words()
            raise WorkerFailed(failure)
        if self._num_blocks is None and (leaving := self.find_leaving()):
            raise WorkerFailed(leaving)
        if deaths := self._workforce.ended():
            self._raise_last_words()
            raise self._loss(deaths)
        if odd := self._workforce.find_divergence():
            raise _diverged(odd)

    def find_leaving(self) -> str | None:
        """Which other node was told to leave, and waits for us to."""
        return self._workforce.find_leaving()

    def num_dropped(self) -> dict[str, int]:
        """What either side of a channel has dropped since the start, by channel."""
        drops = dict(self._dropped_by_workers)
        drops["worker"] += self._listener.num_dropped + self._wires.num_dropped
        drops["worker"] += self._num_impostures
        if self._head is not None:
            drops |= self._head.num_dropped()
        return drops

    def keep_spare(self) -> None:
        """See that on every node a process is ready to take the place of a worker."""
        self._workforce.keep_spare()

    def stop(self) -> None:
        """Tell all workers to leave, and see that they do."""
        self._send_all(Stop())
        self._workforce.join()
        self._close()

    def hurry(self) -> None:
        """End this node's workers at once, whoever waits for them; may be called by a signal."""
        self._workforce.local.hurry()

    def kill(self) -> None:
        """End all workers at once."""
        self._workforce.kill()
        self._close()

    def _close(self) -> None:
        self._wires.close()
        self._listener.close(linger_ms=0)
        if self._head is not None:
            self._head.close()

    def _place(self) -> list[WorkerConfig]:
        """This node's workers, after every node got its own; layers go where memory is."""
        head = self._head
        try:
            placement = place_alone(self.config) if head is None else head.place()
        except ConfigError as error:
            raise WorkerFailed(str(error), is_refusal=True) from error
        self.config = msgspec.structs.replace(self.config, layout=placement.layout)
        workers = [self._worker_config(place) for place in placement.layout.places()]
        return workers if head is None else head.assign(placement, workers)

    def _worker_config(self, place: Place) -> WorkerConfig:
        """What a worker is told; the node that starts it fills in its cores and memory."""
        config = self.config
        return WorkerConfig(
            engine=self._listener.endpoint,
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
            max_kv_blocks=config.max_kv_blocks,
            max_model_len=config.max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_in_flight=config.scheduler_config(1).in_flight_limit,
            max_graph_size=config.max_num_seqs if config.has_cuda_graphs else 0,
            plans_ahead=config.plans_ahead,
            log_level=config.log_level,
        )

    def _bring_together(self) -> None:
        """Until all workers are ready; each goes through its messages as fast as it can."""
        while len(self._ready) < len(self._ranks):
            self.poll(_CHECK_INTERVAL_MS)
            if (received := self._receive()) is not None:
                self._go_on_with(self._accept(*received))
            self.check()
            self.check_forming()

    def _go_on_with(self, message: FromWorker | None) -> None:
        match message:
            case Loaded():
                self._loaded[message.rank] = message
                self._allocate(message)
            case Joined() if message.generation == self.generation:
                self._joined[message.rank] = message
                self._forming.answered(self.config.layout.place(message.rank))
                if len(self._joined) == len(self._ranks):
                    addresses = [self._joined[rank].address for rank in self._ranks]
                    self._send_all(Rendezvous(addresses))
            case Ready() if message.generation == self.generation:
                self._ready.add(message.rank)

    def _allocate(self, loaded: Loaded) -> None:
        """KV memory is allocated when all have loaded, later as much as the first time."""
        if self._num_blocks is None:
            if len(self._loaded) == len(self._ranks):
                self._num_blocks = self._agree_on_blocks(list(self._loaded.values()))
                self._send_all(Allocate(self._num_blocks))
            return
        if loaded.generation != self.generation:  # it was not there yet when the others were told
            self._send(loaded.rank, Reform(self.generation))
        self._send(loaded.rank, Allocate(self._num_blocks))

    def check_forming(self) -> None:
        """Raise WorkerLost if somebody keeps the others waiting, as they come together or in the
        steps that are measured then.
        """
        have_met = len(self._joined) == len(self._ranks)
        done = self._ready if have_met else self._loaded.keys()
        awaited = [self.config.layout.place(rank) for rank in self._ranks if rank not in done]
        known = self._workforce.entries()
        entries = {place: known.get(place) for place in awaited}
        stopped = self._workforce.find_stopped()
        if loss := self._forming.look(entries, stopped, have_met, time.monotonic()):
            raise WorkerLost(*loss)

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

    def _arrive(self, step_id: int) -> None:
        """A result has come: the step before it is done everywhere, and was the same everywhere."""
        self._steps.arrive(step_id, time.monotonic())
        if len(self._ranks) > 1 and (odd := find_divergence(self._workforce.ledgers, step_id - 1)):
            raise _diverged(odd)

    def _loss(self, deaths: Sequence[Death]) -> WorkerLost:
        indexes = [index for death in deaths for index in self._steps.requests_of(death.step_id)]
        return WorkerLost([death.place for death in deaths], "; ".join(map(str, deaths)), indexes)

    def _is_current(self, message: StepResult | StageReport) -> bool:
        first = message.timings[0] if isinstance(message, StageReport) else message
        return self._first_step_id is not None and first.step_id >= self._first_step_id

    def _accept(self, name: bytes, message: FromWorker) -> FromWorker | None:
        """A message that has come; None instead of one that is too late. Raises WorkerLost."""
        if isinstance(message, Dropped):
            self._dropped_by_workers[message.channel] += message.num
            return None
        if name not in self._names:
            return None
        if isinstance(message, Failed):
            raise self._explain(message)
        if isinstance(message, Lost):
            if message.generation == self.generation:
                raise self._explain(message)
            return None
        return message

    def _explain(self, message: Failed | Lost) -> WorkerFailed:
        """Why a worker fails: a rank that was killed breaks its neighbours' connections, and they
        may say so before its process has quite ended.
        """
        reporter = self.config.layout.place(message.rank)
        reason = f"{reporter}: {message.reason}"
        if isinstance(message, Failed):
            if message.is_refusal:
                return WorkerFailed(message.reason, is_refusal=True)
            entry = self._workforce.entries().get(reporter)
            step_id = entry.step_id if entry is not None and entry.is_running else None
            indexes = self._steps.requests_of(step_id)
            return WorkerLost([reporter], f"the worker of {reason}", indexes)
        deaths = self._await_deaths()
        return self._loss(deaths) if deaths else WorkerLost([], reason)

    def _await_deaths(self) -> list[Death]:
        end = time.monotonic() + _DEATH_TAKES_S
        while not (deaths := self._workforce.ended()) and time.monotonic() < end:
            time.sleep(0.01)
        return deaths

    def _raise_last_words(self) -> None:
        """A worker that fails says so before it ends; prefer its reason to its exit status."""
        while (received := self._receive()) is not None:
            self._accept(*received)

    def _receive(self) -> tuple[bytes, FromWorker] | None:
        """The next message. Who is on a wire says nothing on the socket: that is somebody else."""
        if (received := self._wires.receive()) is not None:
            return received
        while (received := self._listener.receive()) is not None:
            if received[0] not in self._wires:
                return received
            self._num_impostures += 1
        return None

    def _send(self, rank: int, message: ToWorker) -> None:
        self._send_to(self._names[rank], encode(message))

    def _send_all(self, message: ToWorker) -> None:
        payload = encode(message)
        for name in self._names:
            self._send_to(name, payload)

    def _send_to(self, name: bytes, payload: bytes) -> None:
        if not self._wires.send(name, payload):
            self._listener.send(name, payload)


def _diverged(odd: Mapping[Place, str]) -> WorkerLost:
    reason = "; ".join(f"{place} {what}" for place, what in odd.items())
    return WorkerLost(list(odd), f"workers diverged: {reason}")
