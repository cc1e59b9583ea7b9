"""When the steps in flight should be back: each stage takes one after the other."""

from .cost import StepLoad
from .cost_model import PipeModel


class PipeClock:
    """Follows plans and results. What comes back earlier or later than expected moves the rest."""

    def __init__(self, model: PipeModel) -> None:
        self._model = model
        self._ends: dict[int, float] = {}
        self._free_at = [0.0] * len(model.stages)
        self._drift = 0.0

    def plan(self, step_id: int, load: StepLoad, now: float, reads: int = -1) -> None:
        """A step enters the pipe; it reads tokens that the step `reads` draws (-1: none)."""
        if not self._ends:
            self._drift, self._free_at = 0.0, [0.0] * len(self._free_at)
        end = now - self._drift
        if reads in self._ends:
            end = max(end, self._ends[reads])
        for i, stage in enumerate(self._model.stages):
            end = self._free_at[i] = max(end, self._free_at[i]) + stage.planned_seconds(load)
        self._ends[step_id] = end

    def commit(self, step_id: int, now: float) -> None:
        """The oldest one has come back."""
        self._drift = now - self._ends.pop(step_id)

    def back_in(self, now: float) -> list[float]:
        """Seconds until each of the steps in flight is back, oldest first."""
        return [max(0.0, end + self._drift - now) for end in self._ends.values()]

    def clear(self) -> None:
        """Nothing is in flight any more."""
        self._ends.clear()
