"""Who wants to know how long a stage took: the seam between the engine and what learns from it."""

from typing import Protocol

from shardline_scheduler.plan import StageTiming


class TimingListener(Protocol):
    """Told of every (stage, step), in the order of the steps of each stage.

    Stages are not told in step with each other: all but the last report several steps at once.
    """

    def observe(self, timing: StageTiming) -> None:
        """Take it in; called in the engine's loop, so it has to be quick."""
        ...
