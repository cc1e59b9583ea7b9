"""Prefill work that is promised by a time, in the order in which it will be done.

The demand-bound test of earliest deadline first, for any fixed order: whatever comes first, the
work up to and including each request must be done before that request is due.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import accumulate, repeat
from math import inf
from operator import mul, sub

Place = tuple[tuple[float, ...], int]
# Rounding in sums of work must not cost a step.
_EPSILON = 1e-9
# So many steps may all take what they are planned to take; of more, some take less.
_FEW_STEPS = 4


@dataclass(frozen=True, slots=True)
class Newcomer:
    """Someone who is not in yet: his place in the order, when he is due, his work in seconds."""

    place: Place
    due: float
    work: float


@dataclass(frozen=True, slots=True)
class Pace:
    """From `start` on, every `step_s` seconds a step does `work` seconds of prefill work; the
    result of a step is there `depth` steps after it has begun. Beyond `_FEW_STEPS`, steps take
    `spared` less, as a share.
    """

    start: float
    step_s: float
    work: float
    depth: int
    spared: float = 0.0

    @property
    def share(self) -> float:
        """Work that is done in a second."""
        return self.work / self.step_s

    def end_of(self, work: float) -> float:
        """When the step has come back that does the last of so much work."""
        num_steps = -(-(work / self.work - _EPSILON) // 1)
        spared = self.spared * max(0.0, num_steps - _FEW_STEPS)
        return self.start + (num_steps - spared + self.depth - 1) * self.step_s


class Demand:
    """Entries in order, their work in seconds of the slowest stage.

    Changing an entry is O(log n), and O(n) in moving memory; a test is one pass. Places, dues and
    works are lists of their own, so that a pass is nearly all done by built-in functions: with a
    thousand entries that is a tenth of a millisecond.
    """

    def __init__(self) -> None:
        self._order: list[Place] = []
        self._dues: list[float] = []
        self._works: list[float] = []
        self._places: dict[Hashable, Place] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, name: Hashable) -> bool:
        return name in self._places

    @property
    def work(self) -> float:
        """All work."""
        return sum(self._works)

    @property
    def last_due(self) -> float:
        """When the last is due; somebody is in."""
        return max(self._dues)

    def put(self, name: Hashable, place: Place, due: float, work: float) -> None:
        """A request that is not in yet."""
        assert name not in self._places, f"{name} is in twice"
        index = bisect_right(self._order, place)
        self._places[name] = place
        self._order.insert(index, place)
        self._dues.insert(index, due)
        self._works.insert(index, work)

    def reduce(self, name: Hashable, work: float) -> None:
        """What is left to do for a request; one that is not in is ignored."""
        if name in self._places:
            self._works[self._index(name)] = work

    def remove(self, name: Hashable) -> None:
        """Its work is done, or is not promised any more."""
        if name in self._places:
            index = self._index(name)
            del self._order[index], self._dues[index], self._works[index], self._places[name]

    def work_before(self, place: Place) -> float:
        """All work that comes before that place."""
        return sum(self._works[: bisect_right(self._order, place)])

    def is_early(self, pace: Pace, newcomer: Newcomer | None = None, *, by_s: float = 0.0) -> bool:
        """Whether everybody is early by so many seconds at least."""
        if newcomer is not None:
            before = self.work_before(newcomer.place)
            if newcomer.due - pace.end_of(before + newcomer.work) < by_s:
                return False
        dues, works = self._with(newcomer)
        if not dues:
            return True
        # Were work done without steps, everybody would be late by less than one step less; and by
        # what steps spare.
        per_work = pace.step_s / pace.work
        smooth: float = min(map(sub, dues, map(mul, accumulate(works), repeat(per_work))))
        smooth -= pace.start + (pace.depth - 1) * pace.step_s + by_s
        if smooth >= pace.step_s + _EPSILON:
            return True
        if smooth < -_EPSILON - pace.spared * sum(works) * per_work:
            return False
        return _least_slack(pace, dues, works) >= by_s

    def least_slack(self, pace: Pace, newcomer: Newcomer | None = None) -> float:
        """Seconds by which the least lucky one is early; negative if somebody is late."""
        return _least_slack(pace, *self._with(newcomer))

    def after(self, work: float) -> "Demand":
        """What is left when so much of it has been done, in order; to be judged, not changed."""
        left = Demand()
        done = list(accumulate(self._works))
        index = bisect_right(done, work)
        left._order, left._dues = self._order[index:], self._dues[index:]
        left._works = self._works[index:]
        if left._works:
            left._works[0] = done[index] - work
        return left

    def ends(self, pace: Pace) -> dict[Hashable, float]:
        """When the last of each one's work is back, if it is done in order."""
        names = sorted(self._places, key=self._places.__getitem__)
        return dict(zip(names, map(pace.end_of, accumulate(self._works)), strict=True))

    def _with(self, newcomer: Newcomer | None) -> tuple[list[float], list[float]]:
        if newcomer is None:
            return self._dues, self._works
        dues, works = self._dues.copy(), self._works.copy()
        index = bisect_left(self._order, newcomer.place)
        dues.insert(index, newcomer.due)
        works.insert(index, newcomer.work)
        return dues, works

    def _index(self, name: Hashable) -> int:
        return bisect_left(self._order, self._places[name])


def _least_slack(pace: Pace, dues: list[float], works: list[float]) -> float:
    step_s, per_work, spared = pace.step_s, 1 / pace.work, pace.spared
    slack = inf
    for due, done in zip(dues, accumulate(works), strict=True):
        num_steps = -((_EPSILON - done * per_work) // 1)
        if num_steps > _FEW_STEPS:
            num_steps -= spared * (num_steps - _FEW_STEPS)
        early = due - num_steps * step_s
        if early < slack:
            slack = early
    return slack - pace.start - (pace.depth - 1) * step_s
