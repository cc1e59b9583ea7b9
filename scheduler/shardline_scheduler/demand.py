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


@dataclass(frozen=True, slots=True)
class Newcomer:
    """Someone who is not in yet: his place in the order, when he is due, his work in seconds."""

    place: Place
    due: float
    work: float


@dataclass(frozen=True, slots=True)
class Pace:
    """From `start` on, every `step_s` seconds a step does `work` seconds of prefill work; the
    result of a step is there `depth` steps after it has begun.
    """

    start: float
    step_s: float
    work: float
    depth: int

    @property
    def share(self) -> float:
        """Work that is done in a second."""
        return self.work / self.step_s

    def end_of(self, work: float) -> float:
        """When the step has come back that does the last of so much work."""
        num_steps = -(-(work / self.work - _EPSILON) // 1)
        return self.start + (num_steps + self.depth - 1) * self.step_s


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

    @property
    def work(self) -> float:
        """All work."""
        return sum(self._works)

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
        # Were work done without steps, everybody would be late by less than one step less.
        lost = map(mul, accumulate(works), repeat(pace.step_s / pace.work))
        smooth: float = min(map(sub, dues, lost))
        smooth -= pace.start + (pace.depth - 1) * pace.step_s + by_s
        if not 0 <= smooth + _EPSILON < pace.step_s + 2 * _EPSILON:
            return smooth > 0
        return _least_slack(pace, dues, works) >= by_s

    def least_slack(self, pace: Pace, newcomer: Newcomer | None = None) -> float:
        """Seconds by which the least lucky one is early; negative if somebody is late."""
        return _least_slack(pace, *self._with(newcomer))

    def delay_until_fit(self, pace: Pace, newcomer: Newcomer) -> float:
        """How much later the newcomer would have to come, the rest being as it is, to fit in.

        Work goes on meanwhile, so slack stays as it is. He has to come behind those that have none
        left for him, or after they are done; and whoever is then before him may not hold him up.
        """
        due_order = newcomer.place[0][1]
        done = list(accumulate(self._works))
        before, delay = self._until_tolerated(pace, newcomer, done)
        for (key, _), done_by_then in zip(self._order, done, strict=True):
            if key[1] > due_order + delay:
                break
            before = max(before, done_by_then)
            delay = max(delay, pace.end_of(before + newcomer.work) - newcomer.due)
        return max(delay, pace.end_of(before + newcomer.work) - newcomer.due)

    def _until_tolerated(
        self, pace: Pace, newcomer: Newcomer, done: list[float]
    ) -> tuple[float, float]:
        """The work up to the last one who is too late with the newcomer before him, and how much
        later that one lets him in.
        """
        due_order, per_work = newcomer.place[0][1], pace.step_s / pace.work
        # Whoever is due after this, his own work aside, is in time.
        latest = pace.start + newcomer.work * per_work + (pace.depth + 1) * pace.step_s
        before = delay = 0.0
        for i in range(bisect_left(self._order, newcomer.place), len(done)):
            if self._dues[i] >= latest + done[i] * per_work:
                continue
            if self._dues[i] < pace.end_of(done[i] + newcomer.work):
                lets_in = self._order[i][0][1] - due_order
                delay = max(delay, min(lets_in, pace.end_of(done[i]) - pace.start))
                before = done[i]
        return before, delay

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
    step_s, per_work = pace.step_s, 1 / pace.work
    slack = inf
    for due, done in zip(dues, accumulate(works), strict=True):
        early = due + ((_EPSILON - done * per_work) // 1) * step_s
        if early < slack:
            slack = early
    return slack - pace.start - (pace.depth - 1) * step_s
