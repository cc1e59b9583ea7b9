"""When the steps in flight should be back: each stage takes one after the other."""

from collections import deque

from .cost import StepLoad
from .cost_model import PipeModel


class PipeClock:
    """Follows plans and results. What comes back earlier or later than expected moves the rest."""

    def __init__(self, model: PipeModel) -> None:
        self._model = model
        self._ends: deque[float] = deque()
        self._free_at = [0.0] * len(model.stages)
        self._drift = 0.0

    def plan(self, load: StepLoad, now: float) -> None:
        """A step enters the pipe."""
        if not self._ends:
            self._drift, self._free_at = 0.0, [0.0] * len(self._free_at)
        end = now - self._drift
        for i, stage in enumerate(self._model.stages):
            end = self._free_at[i] = max(end, self._free_at[i]) + stage.planned_seconds(load)
        self._ends.append(end)

    def commit(self, now: float) -> None:
        """The oldest one has come back."""
        self._drift = now - self._ends.popleft()

    def back_in(self, now: float) -> list[float]:
        """Seconds until each of the steps in flight is back, oldest first."""
        return [max(0.0, end + self._drift - now) for end in self._ends]

    def clear(self) -> None:
        """Nothing is in flight any more."""
        self._ends.clear()
