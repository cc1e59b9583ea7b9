"""The largest rate that a server still serves in time, by bisection."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from math import inf, sqrt

TARGETS = (0.99, 0.9)
MAX_FACTOR = 256.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """Attainment of at least `target` was measured at `rate`, and less at `above`.

    `rate` 0: at no rate that was tried. `above` None: at every rate that was tried.
    """

    target: float
    rate: float
    above: float | None


async def find_capacities(
    measure: Callable[[float], Awaitable[float]], first: float, precision: float
) -> list[Capacity]:
    """For each target; `measure` gives the attainment at a rate, and runs once for a rate.

    Attainment is taken to fall with the rate: what lies above the lowest rate that failed is not
    looked at again.
    """
    attainments: dict[float, float] = {}
    for target in TARGETS:
        while (rate := next_rate(attainments, target, first, precision)) is not None:
            attainments[rate] = await measure(rate)
    return [_capacity(attainments, target) for target in TARGETS]


def next_rate(
    attainments: Mapping[float, float], target: float, first: float, precision: float
) -> float | None:
    """The rate to try next; None if it is known within a factor of 1 + precision.

    Doubles until one fails and halves until one passes, from `first` and at most MAX_FACTOR away
    from it; then takes the geometric mean.
    """
    found = _capacity(attainments, target)
    if not attainments:
        return first
    if found.above is None:
        return 2 * found.rate if 2 * found.rate <= first * MAX_FACTOR else None
    if found.rate == 0:
        return found.above / 2 if found.above / 2 >= first / MAX_FACTOR else None
    if found.above <= found.rate * (1 + precision):
        return None
    return sqrt(found.rate * found.above)


def _capacity(attainments: Mapping[float, float], target: float) -> Capacity:
    above = min((rate for rate, share in attainments.items() if share < target), default=inf)
    rate = max(
        (rate for rate, share in attainments.items() if share >= target and rate < above),
        default=0.0,
    )
    return Capacity(target=target, rate=rate, above=None if above == inf else above)
