"""What a stage without a plan waits for, as a function of time; and how workers' clocks run."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class TimePart(StrEnum):
    """What a stage's time goes to.

    compute        making the batch, the layers, on the last stage the head and drawing tokens
    communication  sending, and waiting for a plan or hidden states that are on their way
    starved        there is work, but other stages have it
    scheduler      the engine has what it needs for a plan, but the plan has not left yet
    idle           there is no work
    """

    COMPUTE = "compute"
    COMMUNICATION = "communication"
    STARVED = "starved"
    SCHEDULER = "scheduler"
    IDLE = "idle"


class EngineTimeline:
    """Why no plan leaves the engine, as stretches of time; seconds on the engine's clock."""

    def __init__(self, now: float) -> None:
        self._starts = [now]
        self._parts = [TimePart.IDLE]

    def planned(self, since: float, now: float) -> None:
        """A plan leaves; the engine could have known since `since`."""
        since = min(max(since, self._starts[-1]), now)
        self._begin(TimePart.SCHEDULER, since)
        self._begin(TimePart.STARVED, now)

    def settled(self, has_work: bool, now: float) -> None:
        """No further plan can be made before something happens."""
        self._begin(TimePart.STARVED if has_work else TimePart.IDLE, now)

    def split(self, start: float, end: float) -> Iterator[tuple[TimePart, float]]:
        """The stretches of [start, end], as seconds; the first one known reaches back for ever."""
        index = max(0, bisect_right(self._starts, start) - 1)
        while start < end:
            is_last = index + 1 == len(self._starts)
            until = end if is_last else min(end, max(start, self._starts[index + 1]))
            yield self._parts[index], until - start
            start, index = until, index + 1

    def forget_before(self, time: float) -> None:
        """Nobody will ask for what was before."""
        index = bisect_right(self._starts, time) - 1
        if index > 0:
            del self._starts[:index], self._parts[:index]

    def _begin(self, part: TimePart, start: float) -> None:
        if part is self._parts[-1]:
            return
        if start <= self._starts[-1]:  # The stretch before has no length.
            self._parts[-1] = part
        else:
            self._starts.append(start)
            self._parts.append(part)


@dataclass(slots=True)
class ClockOffset:
    """How far a worker's clock is ahead of the engine's, from messages in both directions.

    A message arrives after it was sent, so each bounds the offset from one side, as in NTP. Nodes
    have clocks of their own; workers of the engine's node share the engine's, and then 0 fits.
    The bounds widen with time, for clocks that run apart.
    """

    MAX_DRIFT = 1e-4

    _low: float = float("-inf")
    _high: float = float("inf")
    _updated_at: float = 0.0

    @property
    def seconds(self) -> float:
        """The offset; half of the quickest way there and back is its error."""
        if self._low <= 0.0 <= self._high:
            return 0.0
        if self._low == float("-inf"):
            return self._high
        return self._low if self._high == float("inf") else (self._low + self._high) / 2

    def heard_engine(self, sent_at: float, received_at: float) -> None:
        """The worker got a message; `received_at` is on its own clock."""
        self._widen(sent_at)
        self._high = min(self._high, received_at - sent_at)

    def heard_worker(self, sent_at: float, received_at: float) -> None:
        """The engine got a message; `sent_at` is on the worker's clock."""
        self._widen(received_at)
        self._low = max(self._low, sent_at - received_at)

    def _widen(self, now: float) -> None:
        drift = max(0.0, now - self._updated_at) * self.MAX_DRIFT
        self._low, self._high = self._low - drift, self._high + drift
        self._updated_at = max(now, self._updated_at)
