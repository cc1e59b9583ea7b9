"""The head's side of a launch over several nodes: who has come, and who runs which stages."""

import logging
import time
from pathlib import Path

from shardline_server.board_keeper import BoardKeeper
from shardline_server.engine_config import EngineConfig, NodesConfig
from shardline_server.errors import ConfigError
from shardline_server.node_capacity import own_capacity
from shardline_server.node_watch import NodeWatch
from shardline_server.placement import Capacity, Placement
from shardline_server.rendezvous import (
    Assignment,
    Job,
    NodeFacts,
    NoteBoard,
    find_board,
    keep_board,
    own_versions,
)
from shardline_server.worker_placement import describe_crossing, place_on
from shardline_shards.fingerprint import model_fingerprint
from shardline_shards.gate import Gate
from shardline_shards.messages import WorkerConfig

logger = logging.getLogger("shardline.engine")

_OPEN_LIMIT_S = 10.0  # for the own board, or for the launcher's


class Head:
    """Gathers the nodes of a launch and deals workers to them, node by node."""

    def __init__(self, config: EngineConfig, nodes: NodesConfig, gate: Gate) -> None:
        self._config = config
        self._nodes = nodes
        self.watch = NodeWatch(gate, config.host)
        self._keeper: BoardKeeper | None = None
        self._board: NoteBoard | None = None
        self._come: list[NodeFacts] = []

    def place(self) -> Placement:
        """Wait for every node, and decide who runs what.

        Raises ConfigError, also to the nodes, if one is missing or does not fit.
        """
        self._board = board = self._open_board()
        board.put("job", self._job())
        try:
            self._come = self._gather(board)
            return self._place(self._come)
        except ConfigError as error:
            self._send_away(board, str(error))
            raise

    def assign(self, placement: Placement, workers: list[WorkerConfig]) -> list[WorkerConfig]:
        """Give each node its part of all workers, in the order of ranks; returns the head's own."""
        assert self._board is not None
        self.watch.expect([node.name for node in self._come])
        for number, ranks in enumerate(placement.ranks[1:], start=1):
            own = [workers[rank] for rank in ranks]
            self._board.put(f"assignment/{number}", self._assignment(own))
        return [workers[rank] for rank in placement.ranks[0]]

    def num_dropped(self) -> dict[str, int]:
        """What has been dropped on the channels to the nodes, by channel."""
        drops = {"node": self.watch.num_dropped}
        return drops if self._keeper is None else drops | {"rendezvous": self._keeper.num_dropped}

    def close(self) -> None:
        """Take the board away."""
        if self._board is not None:
            self._board.close()
        if self._keeper is not None:
            self._keeper.close()

    def _open_board(self) -> NoteBoard:
        address, secret = self._nodes.board, self._nodes.secret
        if not address.is_kept_by_launcher:
            self._keeper = keep_board(address, secret)
        return find_board(address, secret, time.monotonic() + _OPEN_LIMIT_S)

    def _place(self, come: list[NodeFacts]) -> Placement:
        nodes = [own_capacity(self._config.device), *(node.capacity for node in come)]
        self._check_gpus(nodes)
        placement = place_on(self._config, nodes)
        round_trip_s = max(node.round_trip_s for node in come)
        if warning := describe_crossing(self._config, placement, round_trip_s):
            logger.warning(warning)
        return placement

    def _check_gpus(self, nodes: list[Capacity]) -> None:
        for number, (node, wanted) in enumerate(
            zip(nodes, self._nodes.num_places or (), strict=False)
        ):
            if node.is_cuda and node.num_devices < wanted:
                raise ConfigError(
                    f"--node-gpus gives node {number} {wanted} GPUs and it has {node.num_devices}"
                )

    def _job(self) -> Job:
        return Job(
            num_nodes=self._nodes.num_nodes,
            versions=own_versions(),
            model=self._nodes.model,
            agreed=self._nodes.agreed,
            device=self._config.device,
            needs_weights=self._config.load_format != "dummy",
            fingerprint=model_fingerprint(Path(self._config.model_path)),
        )

    def _gather(self, board: NoteBoard) -> list[NodeFacts]:
        deadline = time.monotonic() + self._nodes.join_timeout_s
        come: list[NodeFacts] = []
        for number in range(1, self._nodes.num_nodes):
            facts = board.take(f"node/{number}", NodeFacts, deadline, lambda: self._missing(come))
            if facts.problem is not None:
                raise ConfigError(f"node {facts.name} does not fit: {facts.problem}")
            logger.info(
                "node %s has joined: %s, round trip %.2f ms",
                facts.name,
                facts.capacity,
                facts.round_trip_s * 1e3,
            )
            come.append(facts)
        return come

    def _missing(self, come: list[NodeFacts]) -> str:
        here = ", ".join(node.name for node in come) or "none"
        wanted = self._nodes.num_nodes - 1
        return (
            f"after {self._nodes.join_timeout_s} s {len(come)} of {wanted} other nodes have come "
            f"({here}); start the missing ones with `shardline worker --join`"
        )

    def _send_away(self, board: NoteBoard, reason: str) -> None:
        for number in range(1, self._nodes.num_nodes):
            board.put(f"assignment/{number}", Assignment(refusal=reason))

    def _assignment(self, workers: list[WorkerConfig]) -> Assignment:
        return Assignment(
            workers=workers,
            threads_per_worker=self._config.threads_per_worker,
            watch=self.watch.endpoint,
        )
