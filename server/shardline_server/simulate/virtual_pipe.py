"""A pipe of stages that compute nothing: steps take what a cost model says, times some noise."""

from collections.abc import Callable

from shardline_scheduler import PipeModel, StepLoad
from shardline_scheduler.plan import StageTiming
from shardline_server.pipe_accounting import PipeAccounting

Noise = Callable[[], float]


class VirtualPipe:
    """The stages of one replica, and the account of their time.

    What a lone step takes beside computing (`trip_overhead_s`) is shared out evenly: the plan's way
    to the workers, each hop between stages, and the token's way back.
    """

    def __init__(self, model: PipeModel, noise: Noise, start: float) -> None:
        num_stages = len(model.stages)
        self._model = model
        self._noise = noise
        self._hop_s = model.trip_overhead_s / (num_stages + 1)
        self._free_at = [start] * num_stages
        self.accounting = PipeAccounting(num_stages, start)

    def submit(self, step_id: int, load: StepLoad, now: float, drawn_at: float = 0.0) -> float:
        """Send a step on its way; returns when the last stage is done with it. What it reads is all
        drawn at `drawn_at`.
        """
        self.accounting.submitted(step_id, now)
        free_at, hop_s, noise = self._free_at, self._hop_s, self._noise
        planned_at = now + hop_s
        sent_at = max(planned_at, drawn_at + hop_s)
        for index, seconds in enumerate(self._times(load)):
            starts_at = max(free_at[index], planned_at)
            received_at = max(starts_at, sent_at)
            compute_s = seconds * noise()
            self.accounting.observe(
                StageTiming(
                    index,
                    step_id,
                    free_at[index],
                    starts_at - free_at[index],
                    0.0,
                    received_at - starts_at,
                    compute_s,
                    0.0,
                )
            )
            free_at[index] = received_at + compute_s
            sent_at = free_at[index] + hop_s
        return free_at[-1]

    def heard_at(self, ended_at: float) -> float:
        """When the engine has the result of a step that ended then."""
        return ended_at + self._hop_s

    def _times(self, load: StepLoad) -> list[float]:
        """Of each stage; equal neighbours are computed once."""
        times: list[float] = []
        before = None
        for stage in self._model.stages:
            times.append(times[-1] if stage is before else stage.seconds(load))
            before = stage
        return times
