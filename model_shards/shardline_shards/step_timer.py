"""Where a worker's time goes, step by step, and what of it has not been reported yet."""

import time
from enum import StrEnum

from shardline_scheduler.plan import StageTiming


class Part(StrEnum):
    """The parts of a step, in their order; each is a field of StageTiming."""

    PLAN_WAIT = "plan_wait_s"
    PREPARE = "prepare_s"
    TENSOR_WAIT = "tensor_wait_s"
    COMPUTE = "compute_s"
    SEND = "send_s"


class StepTimer:
    """A stop-watch whose laps leave no gap: each begins where the one before ended."""

    def __init__(self, stage_index: int) -> None:
        self._stage_index = stage_index
        self.start()

    def start(self) -> None:
        """Begin anew, from now."""
        self._started_at = self._mark = time.monotonic()
        self._laps = dict.fromkeys(Part, 0.0)

    def lap(self, part: Part) -> None:
        """What has passed since the last lap belongs to `part`."""
        now = time.monotonic()
        self._laps[part] += now - self._mark
        self._mark = now

    def finish(self, step_id: int) -> StageTiming:
        """The laps of this step; the next step's first lap begins where the last of them ended."""
        timing = StageTiming(self._stage_index, step_id, self._started_at, *self._laps.values())
        self._started_at = self._mark
        self._laps = dict.fromkeys(Part, 0.0)
        return timing


class TimingLog:
    """Timings that wait for a message of their own.

    One message wakes the engine, so several steps share it; a reader of gauges sees them late by
    `MAX_AGE_MS` at most.
    """

    MAX_LENGTH = 16
    MAX_AGE_MS = 100

    def __init__(self) -> None:
        self._timings: list[StageTiming] = []

    @property
    def has_any(self) -> bool:
        """Whether something is not reported yet."""
        return bool(self._timings)

    @property
    def is_due(self) -> bool:
        """Whether it is time to report."""
        if len(self._timings) >= self.MAX_LENGTH:
            return True
        age_s = self._timings[-1].ended_at - self._timings[0].ended_at
        return age_s * 1000 >= self.MAX_AGE_MS

    def add(self, timing: StageTiming) -> None:
        """Keep it until it is reported."""
        self._timings.append(timing)

    def take(self) -> list[StageTiming]:
        """Everything that is not reported yet."""
        taken, self._timings = self._timings, []
        return taken
