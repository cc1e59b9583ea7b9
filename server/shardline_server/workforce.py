"""All worker processes of an engine, by place: this node's, and what other nodes tell of theirs."""

from collections.abc import Sequence

from shardline_server.local_workers import Death, LocalWorkers
from shardline_server.node_watch import NodeWatch
from shardline_server.step_watch import Remembers, find_divergence
from shardline_server.wires import Wires
from shardline_shards.layout import Place
from shardline_shards.ledger import Entry, Ledger
from shardline_shards.messages import FromWorker


class Workforce:
    """Who lives, and what each is at. Of other nodes' workers it is known within half a second,
    of their deaths at once.
    """

    def __init__(self, watch: NodeWatch | None, wires: Wires[FromWorker]) -> None:
        self.local = LocalWorkers(wires)
        self._watch = watch
        self._last_compared = -1

    @property
    def ledgers(self) -> dict[Place, Ledger]:
        """Of this node's workers."""
        return self.local.ledgers

    def entries(self) -> dict[Place, Entry | None]:
        """What every worker is at."""
        theirs = {} if self._watch is None else self._watch.entries()
        return theirs | {place: ledger.read() for place, ledger in self.ledgers.items()}

    def find_divergence(self) -> dict[Place, str]:
        """Who has done something else in a step that nodes have told of since the last call."""
        theirs = {} if self._watch is None else self._watch.states()
        newest = min((max(state.done, default=-1) for state in theirs.values()), default=-1)
        everybody: dict[Place, Remembers] = {**theirs, **self.ledgers}
        told = {step for state in theirs.values() for step in state.done}
        for step in sorted(step for step in told if self._last_compared < step <= newest):
            self._last_compared = step
            if odd := find_divergence(everybody, step):
                return odd
        return {}

    def find_silent(self) -> str | None:
        """Hear what nodes have said; which of them has fallen silent."""
        return None if self._watch is None else self._watch.find_failure()

    def find_leaving(self) -> str | None:
        """Which other node was told to leave."""
        return None if self._watch is None else self._watch.find_leaving()

    def ended(self) -> list[Death]:
        """The workers that have ended."""
        self.find_silent()
        return self.local.ended() + ([] if self._watch is None else self._watch.ended())

    def find_stopped(self) -> list[Place]:
        """Workers whose process is stopped, as by SIGSTOP or a debugger."""
        return self.local.find_stopped() + ([] if self._watch is None else self._watch.stopped())

    def restart(self, places: Sequence[Place], generation: int) -> None:
        """Start those workers anew, each on the node that it was on."""
        self.local.restart(places, generation)
        if self._watch is not None:
            self._watch.restart(places, generation)

    def keep_spare(self) -> None:
        """See that every node has a process ready to take a worker's place."""
        self.local.keep_spare()
        if self._watch is not None:
            self._watch.keeps_spare = True

    def join(self) -> None:
        """Wait for workers that were told to stop; end those that do not."""
        self._dismiss()
        self.local.join()

    def kill(self) -> None:
        """End all at once."""
        self._dismiss()
        self.local.kill()

    def _dismiss(self) -> None:
        if self._watch is not None:
            self._watch.dismiss()
