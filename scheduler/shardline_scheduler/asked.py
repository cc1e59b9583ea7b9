"""What somebody lately asked for, fading, and what is kept free by that."""

from dataclasses import dataclass
from math import exp

MEMORY_S = 30.0


@dataclass(slots=True)
class Asked:
    """Seconds of prefill, and seconds in a seat, of all requests, be they admitted or not; as
    they were at `time`.
    """

    time: float
    prefill_s: float = 0.0
    stay_s: float = 0.0

    def add(self, now: float, prefill_s: float, stay_s: float) -> None:
        """A request that would take that long."""
        self.fade(now)
        self.prefill_s += prefill_s
        self.stay_s += stay_s

    def fade(self, now: float) -> None:
        """To what it is by then."""
        factor = exp((self.time - now) / MEMORY_S)
        self.prefill_s *= factor
        self.stay_s *= factor
        self.time = now

    @property
    def prefill_share(self) -> float:
        """Of the time."""
        return self.prefill_s / MEMORY_S

    @property
    def num_seats(self) -> float:
        """At once (Little's law)."""
        return self.stay_s / MEMORY_S


@dataclass(frozen=True, slots=True)
class Reserve:
    """What is kept for others: promised requests, and a part of the time for their prompts."""

    num_requests: int = 0
    prefill_share: float = 0.0
