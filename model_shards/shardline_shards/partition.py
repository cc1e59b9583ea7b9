"""Where to cut a model into stages: by what its parts take, so that the slowest stage is fastest.

Pure arithmetic; who measures the parts is `profile.py`.
"""

from collections.abc import Sequence
from itertools import accumulate

from msgspec import Struct

_TOLERANCE = 1e-9


class LayerTimes(Struct, frozen=True):
    """Seconds that the parts of a model take of a usual step.

    `stage_s` is what a stage takes beside its layers, `prologue_s` the embedding, `epilogue_s` the
    last norm, the head and drawing tokens.
    """

    stage_s: float
    prologue_s: float
    layers_s: tuple[float, ...]
    epilogue_s: float

    def stage_times(self, stage_layers: Sequence[int]) -> list[float]:
        """What each stage of a cut takes."""
        ends = list(accumulate(stage_layers))
        times = [
            self.stage_s + sum(self.layers_s[end - count : end])
            for end, count in zip(ends, stage_layers, strict=True)
        ]
        times[0] += self.prologue_s
        times[-1] += self.epilogue_s
        return times

    def scaled(self, stage_layers: Sequence[int], factors: Sequence[float]) -> "LayerTimes":
        """The same, after stages turned out slower or faster by these factors."""
        per_layer = [
            factor
            for factor, count in zip(factors, stage_layers, strict=True)
            for _ in range(count)
        ]
        layers = tuple(s * f for s, f in zip(self.layers_s, per_layer, strict=True))
        return LayerTimes(
            self.stage_s, self.prologue_s * factors[0], layers, self.epilogue_s * factors[-1]
        )


class StageRoom(Struct, frozen=True):
    """Bytes of weights: of each layer, of the two ends, and the most that each stage can hold."""

    layer_bytes: Sequence[float]
    prologue_bytes: float
    epilogue_bytes: float
    limits: Sequence[float]

    def fits(self, stage_index: int, start: int, end: int) -> bool:
        """Whether the stage has room for layers [start, end) and its ends."""
        total = sum(self.layer_bytes[start:end])
        total += self.prologue_bytes * (stage_index == 0)
        total += self.epilogue_bytes * (stage_index == len(self.limits) - 1)
        return total <= self.limits[stage_index]


def cut_stages(
    times: LayerTimes, num_stages: int, room: StageRoom | None = None
) -> tuple[int, ...] | None:
    """Layers of each stage: contiguous, at least one each, the slowest stage as fast as can be.

    Exact, by dynamic programming over (stage, layers before it), O(pp · L²). Among equals the most
    even cut in the sense of least squares, then the one whose first stages hold more. None if
    memory allows no cut.
    """
    return _Cutter(times, num_stages, room).cut()


_Evenness = tuple[float, tuple[int, ...]]  # sum of squares, layers of each stage


class _Cutter:
    def __init__(self, times: LayerTimes, num_stages: int, room: StageRoom | None) -> None:
        self.times = times
        self.num_layers = len(times.layers_s)
        self.num_stages = num_stages
        self.room = room
        self.sums = list(accumulate(times.layers_s, initial=0.0))

    def cut(self) -> tuple[int, ...] | None:
        worst_s = self._slowest()
        if worst_s == float("inf"):
            return None
        return self._most_even(worst_s * (1 + _TOLERANCE))

    def _stage_s(self, stage: int, start: int, end: int) -> float:
        """Infinite where memory is short."""
        if self.room is not None and not self.room.fits(stage, start, end):
            return float("inf")
        seconds = self.times.stage_s + self.sums[end] - self.sums[start]
        seconds += self.times.prologue_s * (stage == 0)
        return seconds + self.times.epilogue_s * (stage == self.num_stages - 1)

    def _ends(self, stage: int, start: int) -> range:
        """Where a stage may end, most layers first: each later one needs one, the last all."""
        if stage == self.num_stages - 1:
            return range(self.num_layers, start, -1)[:1]
        return range(self.num_layers - (self.num_stages - 1 - stage), start, -1)

    def _slowest(self) -> float:
        """The slowest stage of the best cut; from the last stage back, by its first layer."""
        best = {self.num_layers: 0.0}
        for stage in reversed(range(self.num_stages)):
            best = {
                start: self._slowest_from(stage, start, best) for start in range(self.num_layers)
            }
        return best[0]

    def _slowest_from(self, stage: int, start: int, after: dict[int, float]) -> float:
        return min(
            (max(self._stage_s(stage, start, end), after[end]) for end in self._ends(stage, start)),
            default=float("inf"),
        )

    def _most_even(self, limit_s: float) -> tuple[int, ...]:
        """The most even cut with no stage slower than that."""
        best: dict[int, _Evenness] = {self.num_layers: (0.0, ())}
        for stage in reversed(range(self.num_stages)):
            best = {
                start: self._most_even_from(stage, start, limit_s, best)
                for start in range(self.num_layers)
            }
        return best[0][1]

    def _most_even_from(
        self, stage: int, start: int, limit_s: float, after: dict[int, _Evenness]
    ) -> _Evenness:
        best: _Evenness = (float("inf"), ())
        for end in self._ends(stage, start):
            seconds = self._stage_s(stage, start, end)
            if seconds > limit_s:
                continue
            rest, counts = after[end]
            if (total := seconds**2 + rest) < best[0] * (1 - _TOLERANCE):
                best = (total, (end - start, *counts))
        return best
