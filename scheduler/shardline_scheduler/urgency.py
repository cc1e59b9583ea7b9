"""What less urgent requests must leave to more urgent ones.

A promise binds until it is kept, so batch work that was promised its time would keep out whoever
comes later and is in a hurry. Who has promised requests of its class already leaves the more urgent
classes what they lately asked for; the first may have all, so that no class waits for ever.
"""

from collections import Counter
from math import exp, sqrt

from .asked import MEMORY_S, Asked, Reserve
from .budget import Priority

_CLASSES = tuple(Priority)
# What is said of a rate before so much time has passed is little worth.
_LEAST_SEEN_S = 2.0


class Urgency:
    """Counts promised requests, and what was asked for with limits, by class."""

    def __init__(self) -> None:
        self._asked: dict[Priority, Asked] = {}
        self._promised: Counter[Priority] = Counter()
        self._began = 0.0

    def ask(self, priority: Priority, now: float, prefill_s: float, stay_s: float) -> None:
        """A request with limits arrives, be it admitted or not; it would take that long."""
        if not self._asked:
            self._began = now
        self._asked.setdefault(priority, Asked(now)).add(now, prefill_s, stay_s)

    def begin_promise(self, priority: Priority) -> None:
        """A request of that class is promised something."""
        self._promised[priority] += 1

    def end_promise(self, priority: Priority) -> None:
        """It is over, or not promised any more."""
        self._promised[priority] -= 1

    def reserve(self, priority: Priority, now: float) -> Reserve:
        """What one more of that class must leave, beside what the others are promised."""
        return self._kept_from(priority, now, self._promised)

    def reserve_later(self, priority: Priority, now: float) -> Reserve:
        """The most that it may be at that time, when any of the promised requests may be over."""
        return self._kept_from(priority, now, Counter())

    def _kept_from(self, priority: Priority, now: float, promised: Counter[Priority]) -> Reserve:
        if not self._promised[priority]:
            return Reserve()
        seen = 1 - exp(-max(_LEAST_SEEN_S, now - self._began) / MEMORY_S)
        num_requests, share = 0.0, 0.0
        for name in _CLASSES[: _CLASSES.index(priority)]:
            if (asked := self._asked.get(name)) is not None:
                asked.fade(now)
                mean = asked.num_seats / seen
                # As many as a Poisson number of that mean exceeds once in forty times.
                num_requests += max(0.0, mean + 2 * sqrt(mean) - promised[name])
                share += asked.prefill_share / seen
        return Reserve(round(num_requests), share)
