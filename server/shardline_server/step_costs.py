"""The engine's cost model: from the cache or a sweep at first, from every step afterwards."""

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from shardline_scheduler import PipeModel, Scheduler, StageModel, StepLoad
from shardline_scheduler.cost_model import quantile
from shardline_scheduler.plan import StageTiming
from shardline_server.engine_config import EngineConfig
from shardline_server.second_look import SecondLook
from shardline_server.sweep import Measurements, Sweep
from shardline_server.worker_group import WorkerFailed, WorkerGroup, WorkerLost
from shardline_shards.fingerprint import model_fingerprint

logger = logging.getLogger("shardline.engine")

FORMAT = 3
# A cached fit is taken if a short sweep finds it this close.
_CLOSE_ENOUGH = 0.3
_CHECK_PART = 0.25
_ONE_DECODE = StepLoad(0, 1, 256, 0)
_PROMPT = StepLoad(256, 0, 0, 256 * 255 // 2)


class CostCache:
    """Fits on disk, each for one model, split in one way, on one kind of host."""

    def __init__(self, cache_dir: Path, config: EngineConfig) -> None:
        layout = config.layout
        facts = (
            FORMAT,
            model_fingerprint(Path(config.model_path)),
            layout.tp,
            layout.stage_layers,
            config.dtype,
            config.device,
            config.threads_per_worker,
            os.cpu_count(),
            platform.machine(),
            platform.node(),
        )
        name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        self.path = cache_dir / "step-costs" / f"{name}.json"

    def load(self) -> PipeModel | None:
        """The fit, if there is one that can be read."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=PipeModel)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            logger.warning("measuring anew, since %s cannot be read: %s", self.path, error)
            return None

    def save(self, model: PipeModel) -> None:
        """Keep the fit for the next start; a cache that cannot be written is only slower."""
        new = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(msgspec.json.encode(model))
            new.replace(self.path)
        except OSError as error:
            logger.warning("step costs are not kept: %s", error)
            with suppress(OSError):
                new.unlink(missing_ok=True)


class StepCosts:
    """Feeds a scheduler's cost model; a TimingListener. `seconds` are spent on measuring before the
    first request, less if the cached fit still holds; with 0 of them the cache is left alone.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        workers: WorkerGroup,
        cache: CostCache,
        seconds: float,
        *,
        vocab_size: int,
    ) -> None:
        self._scheduler = scheduler
        self._workers = workers
        self._cache = cache
        self._seconds = seconds
        self._vocab_size = vocab_size

    def measure(self) -> None:
        """Before the first request. Raises WorkerFailed."""
        if not self._seconds:
            return
        logger.info("measuring step times for %g s", self._seconds)
        try:
            self._measure()
        except WorkerLost as loss:
            raise WorkerFailed(f"while step times were measured: {loss}") from loss

    def _measure(self) -> None:
        seconds, started, model = self._seconds, time.monotonic(), self._cache.load()
        measured = self._sweep().run(seconds if model is None else seconds * _CHECK_PART)
        if model is not None and error_of(model, measured) > _CLOSE_ENOUGH:
            logger.warning("the cached step costs are not those of this machine any more")
            measured = self._sweep().run(seconds)
            model = None
        if model is None:
            model = _fitted(measured)
            self._cache.save(model)
        self._scheduler.start_over(model)
        logger.info("%s, in %.1f s", describe(model), time.monotonic() - started)

    def second_look(self, is_called: Callable[[], bool]) -> SecondLook | None:
        """For an engine that serves, and has to make way when it `is_called`; None where nothing is
        to be measured.
        """
        if not self._seconds:
            return None
        return SecondLook(self._scheduler, lambda: self._sweep(is_called), self._compare)

    def _sweep(self, is_called: Callable[[], bool] = lambda: False) -> Sweep:
        return Sweep(self._scheduler, self._workers, self._vocab_size, is_called)

    def _compare(self, measured: Measurements) -> None:
        """Take over what was measured now, if planning with it is something else."""
        model, better = self._scheduler.cost_model, _fitted(measured)
        if better.is_ready and distance(model, better, measured) > _CLOSE_ENOUGH:
            model.become(better)
            self._cache.save(model)
            logger.warning("steps take other times than was thought; %s", describe(model))

    def observe(self, timing: StageTiming) -> None:
        """Learn what a step took of a stage."""
        self._scheduler.observe(timing.step_id, timing.stage_index, timing.busy_s)

    def save(self) -> None:
        """Keep what has been learnt."""
        if self._seconds and self._scheduler.cost_model.is_ready:
            self._cache.save(self._scheduler.cost_model)


def describe(model: PipeModel) -> str:
    """One line on what steps cost."""
    if not model.is_ready:
        return "step costs: too few steps measured, learning from requests"
    stages = ", ".join(
        f"stage {index}: a decode {1e3 * stage.seconds(_ONE_DECODE):.1f} ms, "
        f"256 prompt tokens {1e3 * stage.seconds(_PROMPT):.0f} ms"
        for index, stage in enumerate(model.stages)
    )
    return f"step costs: {stages}"


def _fitted(measured: Measurements) -> PipeModel:
    model = PipeModel([StageModel.fitted(samples) for samples in measured.samples])
    if model.is_ready and measured.trips:
        model.trip_overhead_s = quantile(
            [
                max(0.0, trip_s - model.expected_trip_seconds(load))
                for load, trip_s in measured.trips
            ],
            0.5,
        )
    return model


def error_of(model: PipeModel, measured: Measurements) -> float:
    """How far off a fit is from what was measured."""
    return _worst_median(
        (sample.load, abs(stage.seconds(sample.load) / sample.seconds - 1))
        for stage, samples in zip(model.stages, measured.samples, strict=True)
        for sample in samples
    )


def distance(model: PipeModel, other: PipeModel, measured: Measurements) -> float:
    """How far apart the times are that two fits plan with, margins included, for what was measured;
    as a part of the other one's.
    """
    return _worst_median(
        (
            sample.load,
            abs(stage.planned_seconds(sample.load) / same.planned_seconds(sample.load) - 1),
        )
        for stage, same, samples in zip(model.stages, other.stages, measured.samples, strict=True)
        for sample in samples
    )


def _worst_median(errors: Iterable[tuple[StepLoad, float]]) -> float:
    """Of steps with prompts and of those without, the worse median. Decodes are most of what is
    measured, and prompts that are priced at many times their cost would keep everybody out who has
    a limit, so that nobody would ever teach better.
    """
    kinds: dict[bool, list[float]] = {}
    for load, error in errors:
        kinds.setdefault(load.num_prefill_tokens > 0, []).append(error)
    return max((quantile(kind, 0.5) for kind in kinds.values()), default=0.0)
