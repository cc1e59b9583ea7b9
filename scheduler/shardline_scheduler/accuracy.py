"""How well step times are predicted, held against every step that comes in."""

from collections import deque

from msgspec import Struct

from .cost import StepLoad
from .cost_model import PipeModel, quantile

_WINDOW = 256
_REFRESH = 16


class Accuracy(Struct, frozen=True, array_like=True):
    """Totals over all stages and steps since the start, in seconds of computing; and quantiles of
    |predicted / measured - 1| over the last ones.
    """

    num_steps: int = 0
    predicted_s: float = 0.0
    measured_s: float = 0.0
    median_error: float = 0.0
    p90_error: float = 0.0


class StepLog:
    """Remembers what steps held until their times come, and compares them with the model."""

    def __init__(self, model: PipeModel) -> None:
        self._model = model
        self._loads: dict[int, StepLoad] = {}
        self._errors: deque[float] = deque(maxlen=_WINDOW)
        self.accuracy = Accuracy()

    def put(self, step_id: int, load: StepLoad) -> None:
        """A step has been planned."""
        self._loads[step_id] = load
        if len(self._loads) > _WINDOW:  # Times that come later than this are not worth waiting for.
            del self._loads[next(iter(self._loads))]

    def observe(self, step_id: int, stage_index: int, seconds: float) -> None:
        """Learn what a step took of a stage."""
        load, model = self._loads.get(step_id), self._model
        if load is None or seconds <= 0:
            return
        if model.is_ready:
            self._compare(model.stages[stage_index].seconds(load), seconds)
        model.observe(stage_index, load, seconds)

    def _compare(self, predicted_s: float, measured_s: float) -> None:
        old = self.accuracy
        self._errors.append(abs(predicted_s / measured_s - 1))
        median, p90 = old.median_error, old.p90_error
        if old.num_steps % _REFRESH == 0:
            median, p90 = quantile(self._errors, 0.5), quantile(self._errors, 0.9)
        self.accuracy = Accuracy(
            old.num_steps + 1,
            old.predicted_s + predicted_s,
            old.measured_s + measured_s,
            median,
            p90,
        )
