"""Prefill work that is promised by a time, in the order in which it will be done.

The demand-bound test of earliest deadline first, for any fixed order: whatever comes first, the
work up to and including each request must be done before that request is due.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import inf

Place = tuple[tuple[float, ...], int]
_Entry = tuple[Place, list[float]]
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

    Changing an entry is O(log n), and O(n) in moving memory; a test is one pass.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._places: dict[Hashable, Place] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def work(self) -> float:
        """All work."""
        return sum(values[1] for _, values in self._entries)

    def put(self, name: Hashable, place: Place, due: float, work: float) -> None:
        """A request that is not in yet."""
        assert name not in self._places, f"{name} is in twice"
        self._places[name] = place
        insort(self._entries, (place, [due, work]))

    def reduce(self, name: Hashable, work: float) -> None:
        """What is left to do for a request; one that is not in is ignored."""
        if name in self._places:
            self._entries[self._index(name)][1][1] = work

    def remove(self, name: Hashable) -> None:
        """Its work is done, or is not promised any more."""
        if name in self._places:
            del self._entries[self._index(name)]
            del self._places[name]

    def work_before(self, place: Place) -> float:
        """All work that comes before that place."""
        end = bisect_right(self._entries, place, key=_place)
        return sum(values[1] for _, values in islice(self._entries, end))

    def least_slack(self, pace: Pace, newcomer: Newcomer | None = None) -> float:
        """Seconds by which the least lucky one is early; negative if somebody is late."""
        step_s, per_work = pace.step_s, 1 / pace.work
        slack, done = inf, 0.0
        for due, work in self._in_order(newcomer):
            done += work
            early = due + ((_EPSILON - done * per_work) // 1) * step_s
            if early < slack:
                slack = early
        return slack - pace.start - (pace.depth - 1) * step_s

    def delay_until_fit(self, pace: Pace, newcomer: Newcomer) -> float:
        """How much later the newcomer would have to come, the rest being as it is, to fit in.

        Work goes on meanwhile, so slack stays as it is. He has to come behind those that have none
        left for him, or after they are done; and whoever is then before him may not hold him up.
        """
        first = bisect_left(self._entries, newcomer.place, key=_place)
        due_order = newcomer.place[0][1]
        done = before = delay = 0.0
        for i, ((key, _), (due, work)) in enumerate(self._entries):
            done += work
            if i >= first and due < pace.end_of(done + newcomer.work):
                delay = max(delay, min(key[1] - due_order, pace.end_of(done) - pace.start))
                before = done
        done = 0.0
        for (key, _), (_, work) in self._entries:
            done += work
            if key[1] <= due_order + delay:
                before = max(before, done)
            delay = max(delay, pace.end_of(before + newcomer.work) - newcomer.due)
        return max(delay, pace.end_of(before + newcomer.work) - newcomer.due)

    def _in_order(self, newcomer: Newcomer | None) -> Iterator[list[float]]:
        entries = self._entries
        if newcomer is None:
            yield from (values for _, values in entries)
            return
        first = bisect_left(entries, newcomer.place, key=_place)
        yield from (values for _, values in islice(entries, first))
        yield [newcomer.due, newcomer.work]
        yield from (values for _, values in islice(entries, first, None))

    def _index(self, name: Hashable) -> int:
        return bisect_left(self._entries, self._places[name], key=_place)


def _place(entry: _Entry) -> Place:
    return entry[0]
