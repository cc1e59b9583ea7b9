"""An idle engine that has refused something as impossible measures its steps again.

What was measured while others used the machine may be many times too high. Where that makes every
limit impossible, nothing runs that would teach better.
"""

import time
from collections.abc import Callable

from shardline_scheduler import Scheduler
from shardline_server.sweep import Measurements, Sweep

# At most such a part of the time goes into measuring: some clients do ask for the impossible.
_PART = 1 / 20


class SecondLook:
    """A sweep in pieces, each over as soon as somebody calls; `compare` gets what it measured."""

    def __init__(
        self,
        scheduler: Scheduler,
        new_sweep: Callable[[], Sweep],
        compare: Callable[[Measurements], None],
    ) -> None:
        self._scheduler = scheduler
        self._new_sweep = new_sweep
        self._compare = compare
        self._sweep: Sweep | None = None
        self._spent_s = 0.0
        self._not_before = 0.0
        self._is_wanted = False

    def want(self) -> None:
        """Somebody was told that what he asked for is impossible."""
        self._is_wanted = True

    def is_due(self, now: float) -> bool:
        """Whether there is something to measure, once the engine is idle."""
        return self._is_wanted and now >= self._not_before and not self._scheduler.has_work

    def go_on(self) -> None:
        """Measure a shape more; of an idle engine. Raises WorkerLost, with nothing left alive."""
        started = time.monotonic()
        self._sweep = self._sweep or self._new_sweep()
        with self._scheduler.rehearsal():
            self._sweep.run_next()
        if self._sweep.is_complete:
            self._compare(self._sweep.finish())
        now = time.monotonic()
        self._spent_s += now - started
        if self._sweep.is_complete:
            self._not_before = now + self._spent_s / _PART
            self._sweep, self._spent_s, self._is_wanted = None, 0.0, False
