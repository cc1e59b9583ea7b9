"""What follows when workers are lost: bring the group back, or give up when that does not help."""

import logging
import time
from collections import defaultdict, deque

from shardline_server.worker_group import WorkerFailed, WorkerGroup, WorkerLost
from shardline_shards.layout import Place

logger = logging.getLogger("shardline.engine")

MAX_DEATHS = 3
DEATHS_WITHIN_S = 60.0


class Recovery:
    """Restarts lost workers for as long as there is hope."""

    def __init__(self, workers: WorkerGroup) -> None:
        self._workers = workers
        self._deaths: defaultdict[Place | None, deque[float]] = defaultdict(
            lambda: deque(maxlen=MAX_DEATHS)
        )

    def run(self, loss: WorkerLost, steps_s: float) -> None:
        """Return when all workers execute plans again, whoever else is lost meanwhile.

        The steps that were in flight should have taken `steps_s`.
        Raises WorkerFailed if the same worker has died `MAX_DEATHS` times in `DEATHS_WITHIN_S`.
        """
        started = time.monotonic()
        lost: WorkerLost | None = loss
        while lost is not None:
            logger.error("%s; starting generation %d", lost, self._workers.generation + 1)
            self._count(lost, time.monotonic())
            try:
                self._workers.reform(lost, steps_s)
                lost = None
            except WorkerLost as another:
                lost = another
        logger.warning("all workers are back after %.1f s", time.monotonic() - started)

    def _count(self, loss: WorkerLost, now: float) -> None:
        for place in loss.places or [None]:
            deaths = self._deaths[place]
            deaths.append(now)
            if len(deaths) == MAX_DEATHS and now - deaths[0] <= DEATHS_WITHIN_S:
                raise WorkerFailed(
                    f"{MAX_DEATHS} times in {now - deaths[0]:.0f} s the same was lost, "
                    f"so it is not tried again: {loss}"
                )
