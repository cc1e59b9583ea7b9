"""Where the time of each stage goes: pure accounting of what workers and engine report.

A stage's timings leave no gap, so its parts sum to the wall. Waiting for a plan is split by what
the engine was doing meanwhile, waiting for hidden states at the moment when the stage before began
to send; and if the first stage waits for tokens, at the last moment when some were drawn. No clock
of its own: time is an argument, in seconds on the engine's clock.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from shardline_scheduler.plan import StageTiming
from shardline_server.engine_timeline import ClockOffset, EngineTimeline, TimePart
from shardline_server.messages import PipeStats, StageStats

_MEMORY_STEPS = 100
_MOST_IN_FLIGHT = 64
_LATENESS_S = 1e-3  # tokens leave a little before the last stage's clock says that it is done


@dataclass(slots=True)
class _Step:
    """A step that not all stages have reported yet."""

    submitted_at: float
    timings: dict[int, StageTiming] = field(default_factory=dict)


@dataclass(slots=True)
class _StageAccount:
    """Totals of one stage; everything until `accounted_until` is in one of the parts."""

    accounted_until: float
    seconds: dict[TimePart, float] = field(default_factory=lambda: dict.fromkeys(TimePart, 0.0))
    clock: ClockOffset = field(default_factory=ClockOffset)

    def add(self, part: TimePart, seconds: float) -> None:
        self.seconds[part] += seconds


class PipeAccounting:
    """Splits each stage's wall time, step by step; gauges of imbalance beside it."""

    def __init__(
        self, num_stages: int, now: float, predicted_s: Sequence[float] | None = None
    ) -> None:
        self._started_at = now
        self._predicted_s = predicted_s
        self._timeline = EngineTimeline(now)
        self._stages = [_StageAccount(now) for _ in range(num_stages)]
        self._steps: dict[int, _Step] = {}
        self._since = now
        self._drawn_at: deque[float] = deque(maxlen=_MOST_IN_FLIGHT)
        self.balance = Balance(num_stages)

    def woke(self, now: float) -> None:
        """The engine's loop begins a turn."""
        self._since = now

    def heard(self, stage_index: int, sent_at: float, now: float) -> None:
        """A worker's message is read; `sent_at` is on its clock.

        The last stage's bears a result, and makes room for a plan.
        """
        clock = self._stages[stage_index].clock
        clock.heard_worker(sent_at, now)
        if stage_index == len(self._stages) - 1:
            self._since = min(self._since, sent_at - clock.seconds)

    def submitted(self, step_id: int, now: float) -> None:
        """A plan has been sent."""
        self._timeline.planned(self._since, now)
        self._steps[step_id] = _Step(now)
        self._since = now

    def lost(self) -> None:
        """No result comes any more for the plans that have been sent."""
        self._steps.clear()

    def settled(self, has_work: bool, now: float) -> None:
        """The engine has nothing more to plan for now."""
        self._timeline.settled(has_work, now)

    def observe(self, timing: StageTiming) -> None:
        """One stage has finished one step; steps are accounted for in their order."""
        step = self._steps.get(timing.step_id)
        if step is None:
            return  # Of a pipe that was given up, or from before this account began.
        step.timings[timing.stage_index] = timing
        if len(step.timings) < len(self._stages):
            return
        timings = [step.timings[stage] for stage in range(len(self._stages))]
        self._drop_lost_steps(timing.step_id)
        for stage_index in range(len(self._stages)):
            self._account(step, timings, stage_index)
        self._drawn_at.append(self._computed_at(timings[-1]))
        self.balance.add([known.busy_s for known in timings])
        del self._steps[timing.step_id]
        self._timeline.forget_before(min(stage.accounted_until for stage in self._stages))

    def stats(self, now: float) -> PipeStats:
        """Totals until now; steps that are not fully reported yet count from when they are."""
        until = min((step.submitted_at for step in self._steps.values()), default=now)
        step_s = self.balance.step_s
        return PipeStats(
            wall_s=now - self._started_at,
            num_steps=self.balance.num_steps,
            batch_imbalance=self.balance.batch_imbalance,
            stage_imbalance=self.balance.stage_imbalance,
            stages=[
                StageStats(self._seconds(stage, until), step_s[index], predicted_s)
                for index, (stage, predicted_s) in enumerate(
                    zip(self._stages, self._scale_prediction(step_s), strict=True)
                )
            ],
        )

    def _scale_prediction(self, step_s: Sequence[float]) -> Sequence[float | None]:
        """The prediction was for a usual step; what compares is each stage's part of all."""
        if self._predicted_s is None:
            return [None] * len(step_s)
        scale = sum(step_s) / sum(self._predicted_s)
        return [seconds * scale for seconds in self._predicted_s]

    def _drop_lost_steps(self, step_id: int) -> None:
        """A worker that died takes its reports with it; the gap is accounted for as waiting."""
        for lost in [known for known in self._steps if known < step_id]:
            del self._steps[lost]

    def _account(self, step: _Step, timings: Sequence[StageTiming], stage_index: int) -> None:
        account, timing = self._stages[stage_index], timings[stage_index]
        account.clock.heard_engine(step.submitted_at, timing.planned_at)
        offset = account.clock.seconds
        self._account_plan_wait(account, step, timing.planned_at - offset)
        account.add(TimePart.COMPUTE, timing.prepare_s + timing.compute_s)
        account.add(TimePart.COMMUNICATION, timing.send_s)
        received_at = timing.received_at - offset
        if stage_index == 0:
            latest = received_at + _LATENESS_S
            sent_at = max((drawn for drawn in self._drawn_at if drawn <= latest), default=0.0)
        else:
            sent_at = self._computed_at(timings[stage_index - 1])
        in_transit = min(max(0.0, received_at - sent_at), timing.tensor_wait_s)
        account.add(TimePart.COMMUNICATION, in_transit)
        account.add(TimePart.STARVED, timing.tensor_wait_s - in_transit)
        account.accounted_until = max(account.accounted_until, timing.ended_at - offset)

    def _computed_at(self, timing: StageTiming) -> float:
        """When a stage was done with a step, but for sending."""
        offset = self._stages[timing.stage_index].clock.seconds
        return timing.received_at + timing.compute_s - offset

    def _account_plan_wait(self, account: _StageAccount, step: _Step, planned_at: float) -> None:
        left_at = min(max(account.accounted_until, step.submitted_at), planned_at)
        for part, seconds in self._timeline.split(account.accounted_until, left_at):
            account.add(part, seconds)
        account.add(
            TimePart.COMMUNICATION, max(0.0, planned_at - max(left_at, account.accounted_until))
        )

    def _seconds(self, account: _StageAccount, until: float) -> dict[str, float]:
        seconds = {part.value: value for part, value in account.seconds.items()}
        for part, more in self._timeline.split(account.accounted_until, until):
            seconds[part.value] += more
        return seconds


class Balance:
    """How even stages and micro-batches are, over about the last hundred steps.

    With p stages and p micro-batches in flight a cycle takes max(Σ τ_j, p · max τ_j), so the share
    1 - Σ τ_j / (p · max τ_j) of it is lost to uneven micro-batches; and 1 - mean_s / max_s of the
    stages' busy time to an uneven cut.
    """

    def __init__(self, num_stages: int) -> None:
        self._decay = 1 - 1 / _MEMORY_STEPS
        self.num_steps = 0
        self._weight = 0.0
        self._busy_s = [0.0] * num_stages
        self._cycle: deque[float] = deque(maxlen=num_stages)
        self._cycle_used_s = 0.0
        self._cycle_taken_s = 0.0

    def add(self, busy_s: Sequence[float]) -> None:
        """One step, by stage."""
        decay = self._decay
        self.num_steps += 1
        self._weight = self._weight * decay + 1
        self._busy_s = [
            total * decay + new for total, new in zip(self._busy_s, busy_s, strict=True)
        ]
        self._cycle.append(sum(busy_s))
        self._cycle_used_s = self._cycle_used_s * decay + sum(self._cycle)
        self._cycle_taken_s = self._cycle_taken_s * decay + len(self._cycle) * max(self._cycle)

    @property
    def step_s(self) -> list[float]:
        """The mean time that a step takes of each stage."""
        return [total / max(1.0, self._weight) for total in self._busy_s]

    @property
    def batch_imbalance(self) -> float:
        """1 - Σ τ_j / (p · max τ_j) over neighbouring micro-batches; 0 is even."""
        return 1 - self._cycle_used_s / self._cycle_taken_s if self._cycle_taken_s else 0.0

    @property
    def stage_imbalance(self) -> float:
        """1 - mean / max over stages; 0 is even."""
        slowest = max(self._busy_s)
        return 1 - sum(self._busy_s) / len(self._busy_s) / slowest if slowest else 0.0
