"""The head's side of a launch over several nodes: who has come, and who runs which stages."""

import logging
import time
from pathlib import Path

from shardline_server.engine_config import EngineConfig, NodesConfig
from shardline_server.errors import ConfigError
from shardline_server.node_watch import NodeWatch
from shardline_server.rendezvous import (
    Assignment,
    Job,
    NodeFacts,
    NoteBoard,
    open_board,
    own_versions,
)
from shardline_shards.fingerprint import model_fingerprint
from shardline_shards.layout import ParallelLayout, deal
from shardline_shards.messages import WorkerConfig

logger = logging.getLogger("shardline.engine")


class Head:
    """Gathers the nodes of a launch and deals stages to them, node by node."""

    def __init__(self, config: EngineConfig, nodes: NodesConfig) -> None:
        self._config = config
        self._nodes = nodes
        self.watch = NodeWatch(config.host)
        self._board: NoteBoard | None = None

    def assign(self, workers: list[WorkerConfig]) -> list[WorkerConfig]:
        """Wait for every node and give each its workers; returns those of the head itself.

        Raises ConfigError, also to the nodes, if one is missing or does not fit.
        """
        nodes = self._nodes
        self._board = board = open_board(nodes.board, nodes.secret)
        board.put("job", self._job())
        try:
            facts = self._gather(board)
        except ConfigError as error:
            self._send_away(board, str(error))
            raise
        self.watch.expect([node.name for node in facts])
        stages = stages_of_nodes(self._config.layout, nodes.num_nodes)
        for number in range(1, nodes.num_nodes):
            own = [worker for worker in workers if worker.place.stage_index in stages[number]]
            board.put(f"assignment/{number}", self._assignment(own))
        return [worker for worker in workers if worker.place.stage_index in stages[0]]

    def _job(self) -> Job:
        return Job(
            num_nodes=self._nodes.num_nodes,
            versions=own_versions(),
            model=self._nodes.model,
            agreed=self._nodes.agreed,
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
            logger.info("node %s has joined", facts.name)
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
            watch_address=self.watch.address,
        )


def stages_of_nodes(layout: ParallelLayout, num_nodes: int) -> list[range]:
    """Neighbouring stages for each node, so that as few borders as can be cross nodes."""
    return deal(layout.pp, num_nodes)
