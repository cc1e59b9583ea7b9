"""Holds what stages take against what they were cut for, and says which layers to move."""

import logging
from collections.abc import Sequence

from shardline_server.messages import PipeStats
from shardline_shards.partition import LayerTimes, cut_stages

logger = logging.getLogger("shardline.engine")

_STEPS_BETWEEN = 200
_WORTH_MOVING = 0.05


class StageWatch:
    """Looks at every so many steps; logs the first look, and each new advice."""

    def __init__(self, times: LayerTimes, stage_layers: tuple[int, ...]) -> None:
        self._times = times
        self._stage_layers = stage_layers
        self._next_look = _STEPS_BETWEEN
        self._advised: tuple[int, ...] | None = None
        self._has_reported = False

    def look(self, pipe: PipeStats) -> None:
        """Called now and then."""
        if pipe.num_steps < self._next_look:
            return
        self._next_look = pipe.num_steps + _STEPS_BETWEEN
        if not self._has_reported:
            logger.info("a step takes: %s", describe_stages(pipe))
            self._has_reported = True
        better = find_better_cut(self._times, self._stage_layers, pipe)
        if better is not None and better != self._advised:
            logger.warning(
                "stages take other times than they were cut for: %s; for what runs now, %s "
                "(--stage-layers %s)",
                describe_stages(pipe),
                describe_moves(self._stage_layers, better),
                ",".join(map(str, better)),
            )
            self._advised = better


def find_better_cut(
    times: LayerTimes, stage_layers: tuple[int, ...], pipe: PipeStats
) -> tuple[int, ...] | None:
    """A cut whose slowest stage is faster by more than is worth it, by what stages really take."""
    factors = [stage.step_s / (stage.predicted_s or 1.0) for stage in pipe.stages]
    corrected = times.scaled(stage_layers, factors)
    better = cut_stages(corrected, len(stage_layers))
    assert better is not None
    slowest_now, slowest_then = (max(corrected.stage_times(cut)) for cut in (stage_layers, better))
    return better if slowest_then < (1 - _WORTH_MOVING) * slowest_now else None


def describe_stages(pipe: PipeStats) -> str:
    """Predicted and measured, side by side."""
    described = []
    for index, stage in enumerate(pipe.stages):
        predicted_s = stage.predicted_s or 0.0
        described.append(
            f"stage {index} {stage.step_s * 1e3:.1f} ms (predicted {predicted_s * 1e3:.1f})"
        )
    return ", ".join(described)


def describe_moves(before: Sequence[int], after: Sequence[int]) -> str:
    """Which layers go where, in words."""
    owner = [stage for stage, count in enumerate(before) for _ in range(count)]
    new_owner = [stage for stage, count in enumerate(after) for _ in range(count)]
    moves: dict[tuple[int, int], list[int]] = {}
    for layer, move in enumerate(zip(owner, new_owner, strict=True)):
        if move[0] != move[1]:
            moves.setdefault(move, []).append(layer)
    return ", ".join(
        f"move {_describe_layers(layers)} from stage {source} to stage {target}"
        for (source, target), layers in moves.items()
    )


def _describe_layers(layers: list[int]) -> str:
    """A stage's layers are neighbours, and so are those of them that move together."""
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
