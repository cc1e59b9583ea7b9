"""What steps cost in a simulation: a fit that a server has kept, or numbers."""

import random
from collections.abc import Sequence
from copy import deepcopy
from math import exp
from pathlib import Path

import msgspec

from shardline_scheduler import PipeModel, StageModel, StepLoad
from shardline_scheduler.cost_model import MIN_SAMPLES, RangeModel, scaled_features
from shardline_scheduler.regression import NonNegativeFit
from shardline_server.errors import ConfigError
from shardline_server.simulate.virtual_pipe import Noise

_FOLDER = "step-costs"
_NINE_OF_TEN = 1.2816  # standard deviations
_UNITS = (StepLoad(), StepLoad(1), StepLoad(0, 1), StepLoad(0, 0, 1), StepLoad(0, 0, 0, 1))


def read_costs(path: Path, num_stages: int | None) -> PipeModel:
    """The fit in a file. Raises ConfigError if it cannot be read, or is of other stages."""
    try:
        model = msgspec.json.decode(path.read_bytes(), type=PipeModel)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path} holds no costs of steps that this version can read: {error}; "
            "serve the model again, or remove it"
        ) from error
    if not model.is_ready:
        raise ConfigError(f"{path}: too few steps have been measured; serve some requests first")
    return _repeated(model, num_stages, str(path))


def find_costs(cache_dir: Path, num_stages: int | None) -> tuple[Path, PipeModel]:
    """The newest fit that a server on this host has kept, of so many stages if that is said."""
    paths = sorted(
        (cache_dir / _FOLDER).glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    for path in paths:
        model = read_costs(path, None)
        if num_stages in (None, len(model.stages)):
            return path, model
    wanted = f" of {num_stages} stages" if num_stages else ""
    raise ConfigError(
        f"no server has kept what steps{wanted} cost in {cache_dir / _FOLDER}; "
        "serve the model once, or name a file by --costs, or numbers by --cost"
    )


def given_costs(coefficients: Sequence[float], num_stages: int | None) -> PipeModel:
    """Stages that all cost the same: a + b P + c D + d C + e X, in milliseconds."""
    stage = StageModel()
    for part in (stage.memory_bound, stage.compute_bound):
        _set(part, coefficients)
    return PipeModel([stage] * (num_stages or 1))


def _set(part: RangeModel, coefficients: Sequence[float]) -> None:
    scales = [scaled_features(load)[index] for index, load in enumerate(_UNITS)]
    part.fit = NonNegativeFit.assuming(
        [value / 1e3 / scale for value, scale in zip(coefficients, scales, strict=True)]
    )
    part.num_samples = MIN_SAMPLES


def _repeated(model: PipeModel, num_stages: int | None, name: str) -> PipeModel:
    if num_stages in (None, len(model.stages)):
        return model
    if len(model.stages) == 1 and num_stages is not None:
        return PipeModel(model.stages * num_stages, model.trip_overhead_s)
    raise ConfigError(
        f"{name} is of {len(model.stages)} stages and --stages is {num_stages}; "
        "only the costs of one stage can stand for several"
    )


def knowing_spread(model: PipeModel, spread: float) -> PipeModel:
    """The model of a scheduler that has seen many steps with such noise: it plans with their 0.9
    quantile.
    """
    known, margin = deepcopy(model), exp(_NINE_OF_TEN * spread - spread**2 / 2) - 1
    for stage in known.stages:
        for part in (stage.memory_bound, stage.compute_bound):
            part.widen(margin)
    return known


def make_noise(spread: float, seed: object) -> Noise:
    """Factors of mean 1 whose logarithms have that standard deviation; always 1 for 0."""
    if not spread:
        return lambda: 1.0
    draw = random.Random(f"noise {seed}").lognormvariate
    return lambda: draw(-(spread**2) / 2, spread)
