"""Which node runs which workers, and whether their memory holds the weights. No I/O.

Ranks go to nodes in their order, so that as few stage borders as can be cross nodes. Nodes may
differ: each gets stages by what it has, and layers move to where there is memory for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from msgspec import Struct

from shardline_server.errors import ConfigError
from shardline_shards.layout import ParallelLayout, even_stages
from shardline_shards.partition import LayerTimes, StageRoom, cut_stages
from shardline_shards.weight_sizes import WeightSizes

_WEIGHTS_SHARE = 0.9  # of free memory; activations and KV blocks need some as well


class Capacity(Struct, frozen=True, kw_only=True):
    """What a node has: cores and the memory that they share, or GPUs with so much memory each.

    `free_bytes` is None where nobody can tell.
    """

    is_cuda: bool
    num_devices: int
    free_bytes: int | None = None

    def __str__(self) -> str:
        kind = "GPUs" if self.is_cuda else "cores"
        free = "unknown" if self.free_bytes is None else f"{self.free_bytes / 1e9:.1f} GB"
        return f"{self.num_devices} {kind}, {free} free"

    def bytes_per_worker(self, num_workers: int) -> int | None:
        """The memory that each of so many workers finds."""
        if self.free_bytes is None:
            return None
        share = self.free_bytes if self.is_cuda else self.free_bytes / max(1, num_workers)
        return int(share * _WEIGHTS_SHARE)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementRules:
    """What the operator wants. `num_places` are workers for each node (None: one for each GPU, and
    on CPUs as many as are asked for); `weights` and `times` are None where they are not known.
    """

    num_places: tuple[int, ...] | None = None
    may_cross_nodes: bool = False
    has_fixed_stages: bool = False
    weights: WeightSizes | None = None
    times: LayerTimes | None = None
    value_bytes: int = 2
    kv_memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The ranks of each node, and the layout with the layers that each stage can hold."""

    ranks: list[range]
    layout: ParallelLayout

    def crossing_stages(self) -> list[int]:
        """Stages whose shards do not all lie on one node."""
        node_of = [node for node, ranks in enumerate(self.ranks) for _ in ranks]
        stages = range(self.layout.pp)
        return [s for s in stages if len({node_of[r] for r in self.layout.stage_ranks(s)}) > 1]


def place_workers(
    layout: ParallelLayout, nodes: Sequence[Capacity], rules: PlacementRules
) -> Placement:
    """Deal ranks to nodes and layers to stages. Raises ConfigError, which says what would fit."""
    ranks = _deal_ranks(layout.tp, layout.pp, nodes, rules)
    if ranks is None:
        raise ConfigError(_explain_places(layout, nodes, rules))
    # KV memory is the most that it may be: weights that leave less of it are no error.
    weights_only = replace(rules, kv_memory_bytes=0)
    fitting = _fit_layers(layout, ranks, nodes, rules)
    fitting = fitting or _fit_layers(layout, ranks, nodes, weights_only)
    if fitting is None:
        raise ConfigError(_explain_memory(layout, ranks, nodes, weights_only))
    return Placement(ranks=ranks, layout=fitting)


def _deal_ranks(
    tp: int, pp: int, nodes: Sequence[Capacity], rules: PlacementRules
) -> list[range] | None:
    """Whole stages to each node; where they do not fit and may cross nodes, single ranks."""
    room = _room(nodes, rules, tp * pp)
    for unit in (tp, 1) if rules.may_cross_nodes else (tp,):
        weights = [node.num_devices for node in nodes]
        counts = _deal_by_weight(tp * pp // unit, [places // unit for places in room], weights)
        if counts is not None:
            ends = list(accumulate(count * unit for count in counts))
            return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return None


def _room(nodes: Sequence[Capacity], rules: PlacementRules, world_size: int) -> list[int]:
    """The most workers that each node may run."""
    if rules.num_places is not None:
        return list(rules.num_places)
    return [node.num_devices if node.is_cuda else world_size for node in nodes]


def _deal_by_weight(total: int, room: Sequence[int], weights: Sequence[int]) -> list[int] | None:
    """At least one and at most `room` each, the rest by weight (D'Hondt); None if it cannot be."""
    if min(room) < 1 or not len(room) <= total <= sum(room):
        return None
    counts = [1] * len(room)
    for _ in range(total - len(room)):
        free = [node for node in range(len(room)) if counts[node] < room[node]]
        counts[max(free, key=lambda node: weights[node] / (counts[node] + 1))] += 1
    return counts


def _stage_room(
    tp: int, pp: int, ranks: list[range], nodes: Sequence[Capacity], rules: PlacementRules
) -> StageRoom | None:
    """What each stage can hold, over all its shards; None if it is not known."""
    if rules.weights is None:
        return None
    limits: list[int] = []
    for node, own in zip(nodes, ranks, strict=True):
        free_bytes = node.bytes_per_worker(len(own))
        if free_bytes is None:
            return None
        limits += [max(0, free_bytes - rules.kv_memory_bytes)] * len(own)
    weights = rules.weights.scaled(rules.value_bytes)
    stages = [limits[stage * tp : (stage + 1) * tp] for stage in range(pp)]
    return StageRoom(
        weights.layers, weights.prologue, weights.epilogue, [tp * min(stage) for stage in stages]
    )


def _fit_layers(
    layout: ParallelLayout, ranks: list[range], nodes: Sequence[Capacity], rules: PlacementRules
) -> ParallelLayout | None:
    """The layout, with fewer layers where memory is short; None if they do not fit at all."""
    room = _stage_room(layout.tp, layout.pp, ranks, nodes, rules)
    if room is None or all(_stage_fits(layout, room)):
        return layout
    if rules.has_fixed_stages:
        return None
    alike = LayerTimes(0.0, 0.0, (1.0,) * len(room.layer_bytes), 0.0)
    cut = cut_stages(rules.times or alike, layout.pp, room)
    return None if cut is None else ParallelLayout(tp=layout.tp, stage_layers=cut)


def _stage_fits(layout: ParallelLayout, room: StageRoom) -> list[bool]:
    layers = [layout.layers(stage) for stage in range(layout.pp)]
    return [room.fits(stage, held.start, held.stop) for stage, held in enumerate(layers)]


def _explain_places(
    layout: ParallelLayout, nodes: Sequence[Capacity], rules: PlacementRules
) -> str:
    """Why the nodes do not hold the stages, in numbers, and what they would hold."""
    room = _room(nodes, rules, layout.world_size)
    is_limited = rules.num_places is not None or any(node.is_cuda for node in nodes)
    held = f" with {' + '.join(map(str, room))} places" if is_limited else ""
    fits = _what_fits(layout, nodes, rules)
    return (
        f"--pp {layout.pp} --tp {layout.tp} do not fit {len(nodes)} nodes{held}: each has to hold "
        "a stage, and the shards of a stage stay on one node; "
        + (f"{' or '.join(fits)} would fit" if fits else "add GPUs, or take nodes out")
    )


def _what_fits(
    layout: ParallelLayout, nodes: Sequence[Capacity], rules: PlacementRules
) -> list[str]:
    tp, pp, room = layout.tp, layout.pp, _room(nodes, rules, layout.world_size)
    pps = _nearest_first(pp, max(sum(room) // tp, len(nodes)))
    tps = _nearest_first(tp, max(room))
    fits = [f"--pp {other}" for other in pps if _deal_ranks(tp, other, nodes, rules)][:1]
    fits += [f"--tp {other}" for other in tps if _deal_ranks(other, pp, nodes, rules)][:1]
    crossing = replace(rules, may_cross_nodes=True)
    if not rules.may_cross_nodes and _deal_ranks(tp, pp, nodes, crossing):
        fits.append("--allow-tp-across-nodes, at a cost,")
    return fits


def _nearest_first(wanted: int, most: int) -> list[int]:
    return sorted(range(1, most + 1), key=lambda other: abs(other - wanted))


def _explain_memory(
    layout: ParallelLayout, ranks: list[range], nodes: Sequence[Capacity], rules: PlacementRules
) -> str:
    room = _stage_room(layout.tp, layout.pp, ranks, nodes, rules)
    assert room is not None
    total = sum(room.layer_bytes) + room.prologue_bytes + room.epilogue_bytes
    limits = ", ".join(
        f"{limit / 1e9:.3f} for the {layers} layers of stage {stage}"
        for stage, (limit, layers) in enumerate(zip(room.limits, layout.stage_layers, strict=True))
    )
    other = _what_memory_holds(layout, nodes, rules)
    return (
        f"{total / 1e9:.3f} GB of weights, {max(room.layer_bytes) / 1e9:.3f} a layer, do not fit "
        f"--pp {layout.pp}: the memory that is free for them is {limits} GB; "
        + (f"{other} would fit" if other else "it takes more memory, or a smaller --dtype")
    )


def _what_memory_holds(
    layout: ParallelLayout, nodes: Sequence[Capacity], rules: PlacementRules
) -> str | None:
    """Other layers for as many stages, or the next larger number of stages that fits."""
    assert rules.weights is not None
    num_layers, free = len(rules.weights.layers), replace(rules, has_fixed_stages=False)
    for pp in range(layout.pp, num_layers + 1):
        other = ParallelLayout(tp=layout.tp, stage_layers=even_stages(num_layers, pp))
        ranks = _deal_ranks(layout.tp, pp, nodes, rules)
        fitting = ranks and _fit_layers(other, ranks, nodes, free)
        if fitting and pp == layout.pp:
            return f"--stage-layers {','.join(map(str, fitting.stage_layers))}"
        if fitting:
            return f"--pp {pp}"
    return None
