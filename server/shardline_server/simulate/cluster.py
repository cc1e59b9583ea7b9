"""Many replicas behind a router, event by event."""

import heapq
from collections.abc import Callable, Iterable, Sequence
from math import inf

from shardline_server.simulate.replica import Replica, Visit

Router = Callable[[Sequence[Replica], Visit, float], Replica]


def earliest_finish(replicas: Sequence[Replica], visit: Visit, now: float) -> Replica:
    """To whom predicts the earliest last token."""
    return min(replicas, key=lambda replica: replica.finish_time(visit, now))


def fewest_requests(replicas: Sequence[Replica], visit: Visit, now: float) -> Replica:
    """To whom has the fewest requests, waiting or running."""
    return min(replicas, key=lambda replica: replica.num_open)


ROUTERS: dict[str, Router] = {
    "earliest-finish": earliest_finish,
    "fewest-requests": fewest_requests,
}


class Cluster:
    """Replicas move on in the order of their times; visits that come at such a time go first."""

    def __init__(self, replicas: Sequence[Replica], router: Router) -> None:
        self.replicas = replicas
        self.now = 0.0
        self._router = router
        self._numbers = {id(replica): number for number, replica in enumerate(replicas)}
        self._due: list[tuple[float, int]] = []

    def run(self, visits: Iterable[Visit]) -> None:
        """Until all visits, which come in the order of their arrivals, are over."""
        for visit in visits:
            self._advance_before(visit.arrival_s)
            self.now = visit.arrival_s
            replica = self._router(self.replicas, visit, self.now)
            replica.arrive(visit, self.now)
            self._schedule(replica)
        self._advance_before(inf)
        for replica in self.replicas:
            replica.check()

    def _advance_before(self, time: float) -> None:
        while self._due and self._due[0][0] < time:
            due, number = heapq.heappop(self._due)
            replica = self.replicas[number]
            if due == replica.next_time:  # Else it has been asked for another time since.
                self.now = max(self.now, due)
                replica.advance(self.now)
                self._schedule(replica)

    def _schedule(self, replica: Replica) -> None:
        if (due := replica.next_time) < inf:
            heapq.heappush(self._due, (due, self._numbers[id(replica)]))
