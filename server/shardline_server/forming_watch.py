"""While workers are started and brought together: who keeps the others waiting."""

from collections.abc import Collection, Mapping
from math import inf

from shardline_server.step_watch import allowed_s, find_stuck
from shardline_shards.layout import Place
from shardline_shards.ledger import Entry

STOPPED_LIMIT_S = 5.0
ANSWER_LIMIT_S = 20.0  # twice the limit for forming groups, in which a survivor may be stuck
STILL_LIMIT_S = 120.0  # importing torch from a slow disk is not seen in any ledger
_TRYOUT_STEP = -1


class FormingWatch:
    """One attempt to bring all workers together. Time is an argument."""

    def __init__(self, survivors: Collection[Place], now: float, steps_s: float) -> None:
        """`survivors` were told to drop what they do; they answer that they have joined again.

        What they do is to form groups, or steps that should take `steps_s` (infinity while nobody
        can tell) and are allowed as much more as they are when nobody is lost.
        """
        self._unanswered = set(survivors)
        step_limit_s = STILL_LIMIT_S if steps_s == inf else allowed_s(steps_s)
        self._answer_limit_s = max(ANSWER_LIMIT_S, step_limit_s)
        self._answer_by = now + self._answer_limit_s
        self._stopped_since: dict[Place, float] = {}
        self._last: dict[Place, tuple[Entry | None, float]] = {}

    def answered(self, place: Place) -> None:
        """It has joined."""
        self._unanswered.discard(place)

    def look(
        self,
        awaited: Mapping[Place, Entry | None],
        stopped: Collection[Place],
        have_met: bool,
        now: float,
    ) -> tuple[list[Place], str] | None:
        """Workers to hold dead, and why; None while there is hope.

        `awaited` are those that load, or once all `have_met` that are not ready, with what they
        are at. A process that is `stopped` goes on by itself after a moment, or never; a survivor
        answers after a step at most; whoever loads or computes shows it in its ledger.
        """
        return (
            self._find_stopped(stopped, now)
            or self._find_unanswered(now)
            or self._find_still(awaited, have_met, now)
        )

    def _find_stopped(
        self, stopped: Collection[Place], now: float
    ) -> tuple[list[Place], str] | None:
        self._stopped_since = {place: self._stopped_since.get(place, now) for place in stopped}
        places = [p for p, since in self._stopped_since.items() if now - since > STOPPED_LIMIT_S]
        return _held_dead(places, f"stopped for {STOPPED_LIMIT_S:.0f} s")

    def _find_unanswered(self, now: float) -> tuple[list[Place], str] | None:
        places = sorted(self._unanswered) if now > self._answer_by else []
        return _held_dead(places, f"no answer for {self._answer_limit_s:.0f} s")

    def _find_still(
        self, awaited: Mapping[Place, Entry | None], have_met: bool, now: float
    ) -> tuple[list[Place], str] | None:
        """Once they have met, they wait for each other: then all of them have to be still."""
        for place, entry in awaited.items():
            if place not in self._last or self._last[place][0] != entry:
                self._last[place] = (entry, now)
        still = {p: e for p, e in awaited.items() if now - self._last[p][1] > STILL_LIMIT_S}
        places = list(still)
        if have_met:
            places = find_stuck(still, _TRYOUT_STEP) if len(still) == len(awaited) else []
        return _held_dead(places, f"no progress for {STILL_LIMIT_S:.0f} s")


def _held_dead(places: list[Place], why: str) -> tuple[list[Place], str] | None:
    return (places, f"{why}; held dead: {', '.join(map(str, places))}") if places else None
