"""Shares of tenants: who goes first among guests, and what a busy tenant must leave to others.

Order: virtual token counters (VTC, Sheng et al. 2024). A request is charged to its tenant when it
queues, with what it is planned to take, and that is put right when it ends. Its turn is the
counter before; whoever returns is lifted to the turn that is being served, so that being away earns
nothing.

Room: of tenants that have more than an equal part of the promised requests, each must leave the
others what they lately asked for, up to that equal part.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from .asked import MEMORY_S, Asked, Reserve

INPUT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
_HEADROOM = 1.5
_LEAST_HEADROOM = 2.0


class Tenants:
    """Counters by tenant. Who has nothing alive and has asked for nothing lately is forgotten."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._alive: Counter[str] = Counter()
        self._promised: Counter[str] = Counter()
        self._asked: dict[str, Asked] = {}
        self._turn = 0.0

    def ask(self, tenant: str, now: float, prefill_s: float, stay_s: float) -> None:
        """A request arrives, be it admitted or not; it would take that long."""
        self._asked.setdefault(tenant, Asked(now)).add(now, prefill_s, stay_s)

    def queue(self, tenant: str, cost: float, *, is_promised: bool) -> float:
        """A request is taken in; returns its turn."""
        turn = self._counters.get(tenant, 0.0)
        if not self._alive[tenant]:
            turn = max(turn, self._turn)
        self._counters[tenant] = turn + cost
        self._alive[tenant] += 1
        if is_promised:
            self._promised[tenant] += 1
        return turn

    def serve(self, turn: float) -> None:
        """A guest with this turn begins."""
        self._turn = max(self._turn, turn)

    def end(self, tenant: str, unspent: float) -> None:
        """A request is over; `unspent` of what it was charged comes back."""
        self._counters[tenant] -= unspent
        self._alive[tenant] -= 1

    def begin_promise(self, tenant: str) -> None:
        """A request that was taken in without a promise has got one."""
        self._promised[tenant] += 1

    def end_promise(self, tenant: str) -> None:
        """A promised request is over, or not promised any more."""
        self._promised[tenant] -= 1

    def reserve(self, tenant: str, now: float) -> Reserve:
        """What the tenant must leave to others with one more request of its own. The first one may
        have all.
        """
        own, total = self._promised[tenant] + 1, self._promised.total() + 1
        others = self._others(tenant, now)
        if own == 1 or own * (len(others) + 1) <= total:
            return Reserve()
        return _kept_for(others, total, self._promised)

    def reserve_later(self, tenant: str, now: float, guests: Sequence[str]) -> Reserve:
        """The most that it may be at that time, when any of the promised requests may be over, and
        guests of these tenants may have been promised something.
        """
        own = self._promised[tenant] + guests.count(tenant) + 1
        if own == 1:
            return Reserve()
        total = self._promised.total() + len(guests) + 1
        return _kept_for(self._others(tenant, now), total, {})

    def _others(self, tenant: str, now: float) -> dict[str, Asked]:
        for name in [
            name for name, asked in self._asked.items() if self._is_gone(name, asked, now)
        ]:
            del self._asked[name]
            self._counters.pop(name, None)
            del self._alive[name], self._promised[name]
        for asked in self._asked.values():
            asked.fade(now)
        return {name: asked for name, asked in self._asked.items() if name != tenant}

    def _is_gone(self, name: str, asked: Asked, now: float) -> bool:
        return not self._alive[name] and now - asked.time > 4 * MEMORY_S


def _kept_for(others: dict[str, Asked], total: int, promised: Mapping[str, int]) -> Reserve:
    """What they lately asked for, up to an equal part of `total` requests, beside what they are
    promised.
    """
    num_active = len(others) + 1
    num_requests, share = 0.0, 0.0
    for name, asked in others.items():
        wanted = _HEADROOM * asked.num_seats + _LEAST_HEADROOM
        num_requests += max(0.0, min(wanted, total / num_active) - promised.get(name, 0))
        share += min(_HEADROOM * asked.prefill_share, 1 / num_active)
    return Reserve(round(num_requests), share)
