"""What the workers' ledgers tell: who is stuck when a result does not come, and who did something
else than the others.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from shardline_scheduler.plan import StepPlan
from shardline_shards.layout import Place
from shardline_shards.ledger import Entry, Operation

HANG_FLOOR_S = 5.0
HANG_FACTOR = 10.0
_WAITS_FOR_STAGE = (Operation.ALL_REDUCE, Operation.GATHER)


class StepWatch:
    """Plans whose results are awaited, and for how long nothing has come. Time is an argument."""

    def __init__(self) -> None:
        self._plans: dict[int, StepPlan] = {}
        self._since = 0.0

    def submit(self, plan: StepPlan, now: float) -> None:
        """A plan goes out."""
        if not self._plans:
            self._since = now
        self._plans[plan.step_id] = plan

    def arrive(self, step_id: int, now: float) -> None:
        """Its result has come."""
        self._plans.pop(step_id, None)
        self._since = now

    def forget(self) -> None:
        """Nothing will come any more."""
        self._plans.clear()

    def requests_of(self, step_id: int | None) -> list[int]:
        """The indexes of the requests in a step that is in flight."""
        plan = None if step_id is None else self._plans.get(step_id)
        return [] if plan is None else plan.request_indexes

    def overdue(self, expected_s: float, now: float) -> int | None:
        """The oldest step in flight, if its result has been awaited far too long.

        `expected_s` is what all plans in flight should take; ten times that and 5 s are allowed.
        """
        if self._plans and now - self._since > allowed_s(expected_s):
            return next(iter(self._plans))
        return None


def allowed_s(expected_s: float) -> float:
    """For how long steps are waited for that should take `expected_s`."""
    return HANG_FLOOR_S + HANG_FACTOR * expected_s


def find_stuck(entries: Mapping[Place, Entry | None], step_id: int) -> list[Place]:
    """Who holds up a step: of those that have not finished it, whoever waits for nobody.

    Who receives waits for the stage before. In a sum or gather of a stage, those wait that are
    further than another; with all of them as far, all are held to be stuck.
    """
    late = [place for place, entry in entries.items() if not _has_finished(entry, step_id)]
    working = [place for place in late if _operation(entries[place]) is not Operation.RECEIVE]
    candidates = working or late
    first = min((place.stage_index for place in candidates), default=0)
    ranks = [place for place in candidates if place.stage_index == first]
    alone = [place for place in ranks if _operation(entries[place]) not in _WAITS_FOR_STAGE]
    if alone:
        return alone
    progress = {place: entry.num_operations for place in ranks if (entry := entries[place])}
    return [place for place in ranks if progress[place] == min(progress.values())]


class Remembers(Protocol):
    """Whoever can tell what a worker has done: its ledger, or what a node has told of it."""

    def checksums(self, step_id: int) -> tuple[int, int] | None:
        """See `Ledger.checksums`."""
        ...


def find_divergence(ledgers: Mapping[Place, Remembers], step_id: int) -> dict[Place, str]:
    """Who executed another plan than most, or other operations than most of its stage, and what.

    Where there is no majority, everybody in question. Ranks that have not done the step say
    nothing yet.
    """
    done = {place: sums for place, ledger in ledgers.items() if (sums := ledger.checksums(step_id))}
    plans = {place: plan for place, (plan, _) in done.items()}
    odd = dict.fromkeys(_minority(plans), f"was given another plan of step {step_id}")
    for stage_index in {place.stage_index for place in done}:
        ranks = [place for place in done if place.stage_index == stage_index]
        for place in _minority({place: done[place][1] for place in ranks}):
            odd.setdefault(place, f"did other operations in step {step_id} than its stage")
    return odd


def _minority(values: Mapping[Place, int]) -> list[Place]:
    counts = Counter(values.values())
    if len(counts) < 2:
        return []
    (value, most), (_, second), *_ = counts.most_common()
    return [place for place, own in values.items() if most == second or own != value]


def _has_finished(entry: Entry | None, step_id: int) -> bool:
    if entry is None or entry.step_id < step_id:
        return False
    return entry.step_id > step_id or not entry.is_running


def _operation(entry: Entry | None) -> Operation | None:
    return entry.operation if entry is not None and entry.is_running else None
