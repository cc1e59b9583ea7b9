"""`shardline worker --join`: a node beside the head, running the workers that the head assigns."""

import logging
import signal
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shardline_server.child import ChildExits
from shardline_server.engine_config import BoardAddress
from shardline_server.errors import ConfigError
from shardline_server.local_workers import LocalWorkers
from shardline_server.node_capacity import own_capacity
from shardline_server.node_watch import SILENCE_LIMIT_S, Answer, HeadWatch
from shardline_server.placement import Capacity
from shardline_server.rendezvous import (
    Assignment,
    Job,
    NodeFacts,
    NoteBoard,
    find_board,
    node_name,
    own_address,
    own_versions,
)
from shardline_shards.errors import ShardError
from shardline_shards.fingerprint import model_fingerprint
from shardline_shards.sources import resolve_model

logger = logging.getLogger("shardline.node")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeSettings:
    """How to take part; `model` and `address` override what is found.

    A launcher also says this node's `number`, and the settings that it was `agreed` on.
    """

    board: BoardAddress
    secret: str
    model: str | None
    address: str | None
    cache: Path | None
    join_timeout: float
    number: int | None = None
    agreed: dict[str, str] = field(default_factory=dict)


class _Leave(BaseException):
    """A signal says that this node shall leave at once."""


class _StopSignals:
    """The first SIGTERM or SIGINT tells the head, once there is one, which lets requests finish and
    sends this node away; every other one raises _Leave. So whoever stops all nodes at once loses
    nothing.
    """

    def __init__(self) -> None:
        self.has_head = False
        self.told_to_leave = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        if self.told_to_leave or not self.has_head:
            raise _Leave
        self.told_to_leave = True


def run_node(settings: NodeSettings) -> int:
    """Join, run workers until the head or a signal ends it; returns the exit status.

    Raises ConfigError if this node cannot take part.
    """
    signals = _StopSignals()
    workers = LocalWorkers()
    try:
        return _run(settings, workers, signals)
    except _Leave:
        return 0
    finally:
        workers.kill()


def _run(settings: NodeSettings, workers: LocalWorkers, signals: _StopSignals) -> int:
    name, assignment = _join(settings)
    workers.start(assignment.workers, assignment.threads_per_worker)
    assert assignment.watch is not None
    head = HeadWatch(assignment.watch, name)
    places = ", ".join(str(config.place) for config in assignment.workers)
    logger.info("joined as %s; runs %s", name, places)
    exits = ChildExits()
    signals.has_head = True
    while not head.answer.leave:
        head.beat(workers.states(), exits, told_to_leave=signals.told_to_leave)
        if head.silence_s > SILENCE_LIMIT_S:
            logger.error("the head has not been heard for %.1f s", head.silence_s)
            return 1
        _follow(head.answer, workers)
    head.close()
    workers.join()
    return 0


def _follow(answer: Answer, workers: LocalWorkers) -> None:
    """Start workers anew that the head holds lost."""
    own = {state.place: state.generation for state in workers.states()}
    for place, generation in answer.restarted:
        if own.get(place, generation) < generation:
            logger.warning("starting the worker of %s anew: generation %d", place, generation)
            workers.restart([place], generation)
    if answer.keeps_spare:
        workers.keep_spare()


def _join(settings: NodeSettings) -> tuple[str, Assignment]:
    """Find the head, check that we fit, get work. Raises ConfigError."""
    deadline = time.monotonic() + settings.join_timeout
    with closing(find_board(settings.board, settings.secret, deadline)) as board:
        return _take_part(board, deadline, settings)


def _take_part(board: NoteBoard, deadline: float, settings: NodeSettings) -> tuple[str, Assignment]:
    where = settings.board
    job = board.take("job", Job, deadline, lambda: f"the head at {where} offers no job")
    number = _take_number(board, job, settings.number)
    address = settings.address or own_address(where.host, where.port)
    name = f"{number} ({node_name()}, {address})"
    try:
        _check_agreed(job, settings)
        capacity = _own_capacity(job.device)
        model_path = _find_model(job, settings)
    except (ConfigError, ShardError) as error:
        board.put(f"node/{number}", NodeFacts(name=name, address=address, problem=str(error)))
        raise
    facts = NodeFacts(
        name=name,
        address=address,
        capacity=capacity,
        round_trip_s=board.measure_round_trip(),
    )
    board.put(f"node/{number}", facts)
    assignment = _take_assignment(board, number, deadline, settings)
    return name, _localized(assignment, model_path, address)


def _take_number(board: NoteBoard, job: Job, wanted: int | None) -> int:
    """This node's number: what the launcher said, else the next. Raises ConfigError if taken."""
    number = board.draw_number() if wanted is None else wanted
    if number >= job.num_nodes:
        raise ConfigError(f"all {job.num_nodes} nodes have joined already; this one is too many")
    if not board.claim(number):
        raise ConfigError(f"node {number} has joined already; this one is too many")
    return number


def _check_agreed(job: Job, settings: NodeSettings) -> None:
    for name, value in settings.agreed.items():
        if value != job.agreed[name]:
            raise ConfigError(
                f"{name} is {value} here and {job.agreed[name]} on the head; "
                "start all nodes with the same settings"
            )


def _own_capacity(device: str) -> Capacity:
    capacity = own_capacity(device)
    if not capacity.num_devices:
        raise ConfigError("the head serves on CUDA and this node has no GPU; --device cpu on both")
    return capacity


def _take_assignment(
    board: NoteBoard, number: int, deadline: float, settings: NodeSettings
) -> Assignment:
    missing = f"the head at {settings.board} gave no work; is another node missing?"
    assignment = board.take(f"assignment/{number}", Assignment, deadline, lambda: missing)
    if assignment.refusal is not None:
        raise ConfigError(f"the head does not start: {assignment.refusal}")
    return assignment


def _find_model(job: Job, settings: NodeSettings) -> Path:
    """The model's folder here. Raises ConfigError or ShardError if the head's differs."""
    ours = own_versions()
    for package, version in job.versions.items():
        if ours[package] != version:
            raise ConfigError(f"{package} is {ours[package]} here and {version} on the head")
    path = resolve_model(
        settings.model or job.model, cache_dir=settings.cache, needs_weights=job.needs_weights
    )
    fingerprint = model_fingerprint(path)
    if fingerprint != job.fingerprint:
        raise ConfigError(
            f"the model in {path} ({fingerprint}) is not the head's ({job.fingerprint})"
        )
    return path


def _localized(assignment: Assignment, model_path: Path, address: str) -> Assignment:
    replace = msgspec.structs.replace
    workers = [
        replace(config, model_path=str(model_path), host=address) for config in assignment.workers
    ]
    return replace(assignment, workers=workers)
