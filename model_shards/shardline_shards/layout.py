"""Who holds what: ranks on the tensor and pipeline axes, and the parts that each gets."""

from collections.abc import Sequence
from itertools import accumulate

from msgspec import Struct


class Place(Struct, frozen=True, order=True):
    """One worker's coordinates: its stage on the pipeline axis and its rank on the tensor axis."""

    stage_index: int
    tp_rank: int

    def __str__(self) -> str:
        return f"stage {self.stage_index}, tp rank {self.tp_rank}"


class ParallelLayout(Struct, frozen=True, kw_only=True):
    """How a model is spread: `tp` shards in each stage, and the decoder layers of each stage.

    Global ranks run over the tensor axis first, so the ranks of one stage are neighbours.
    """

    tp: int
    stage_layers: tuple[int, ...]

    @property
    def pp(self) -> int:
        """The number of pipeline stages."""
        return len(self.stage_layers)

    @property
    def world_size(self) -> int:
        """The number of workers."""
        return self.tp * self.pp

    def rank(self, place: Place) -> int:
        """The global rank of a place."""
        return place.stage_index * self.tp + place.tp_rank

    def place(self, rank: int) -> Place:
        """The place of a global rank."""
        return Place(*divmod(rank, self.tp))

    def places(self) -> list[Place]:
        """All places, in the order of their ranks."""
        return [self.place(rank) for rank in range(self.world_size)]

    def stage_ranks(self, stage_index: int) -> list[int]:
        """The global ranks of one stage."""
        return [stage_index * self.tp + tp_rank for tp_rank in range(self.tp)]

    def layers(self, stage_index: int) -> range:
        """The decoder layers of one stage."""
        end = list(accumulate(self.stage_layers))[stage_index]
        return range(end - self.stage_layers[stage_index], end)

    def is_first(self, place: Place) -> bool:
        """Whether the place embeds tokens."""
        return place.stage_index == 0

    def is_last(self, place: Place) -> bool:
        """Whether the place computes logits."""
        return place.stage_index == self.pp - 1


class HeadShare(Struct, frozen=True):
    """The attention heads of one tp rank.

    Where there are fewer KV heads than ranks, several ranks hold the same KV head, and only the
    first of them `owns_kv`, so that sums over ranks count it once.
    """

    query_heads: range
    kv_heads: range
    owns_kv: bool


def deal(total: int, num_parts: int) -> list[range]:
    """Cut `range(total)` into contiguous parts that differ by at most one; larger parts first."""
    small, num_large = divmod(total, num_parts)
    ends = list(accumulate(small + (part < num_large) for part in range(num_parts)))
    return [range(end - small - (part < num_large), end) for part, end in enumerate(ends)]


def deal_heads(num_query_heads: int, num_kv_heads: int, tp: int) -> list[HeadShare]:
    """Deal attention heads over tp ranks, whole KV-head groups where there are enough of them.

    With more ranks than KV heads, KV heads are replicated and the query heads of a group are dealt
    over the ranks that hold its KV head.
    """
    if tp > num_query_heads:
        raise ValueError(f"{num_query_heads} query heads cannot be dealt over {tp} ranks")
    group_size = num_query_heads // num_kv_heads
    if tp <= num_kv_heads:
        return [
            HeadShare(range(kv.start * group_size, kv.stop * group_size), kv, True)
            for kv in deal(num_kv_heads, tp)
        ]
    shares = []
    for kv_head, ranks in enumerate(deal(tp, num_kv_heads)):
        for position, part in enumerate(deal(group_size, len(ranks))):
            start = kv_head * group_size
            query_heads = range(start + part.start, start + part.stop)
            shares.append(HeadShare(query_heads, range(kv_head, kv_head + 1), position == 0))
    return shares


def even_stages(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers per stage when nothing is known about their cost.

    Later stages get no more than earlier ones, since the last also has the head.
    """
    return tuple(len(part) for part in deal(num_layers, num_stages))


def check_stages(stage_layers: Sequence[int], num_layers: int) -> None:
    """Raise ValueError unless the stages hold each of `num_layers` layers exactly once."""
    if min(stage_layers) < 1:
        raise ValueError(f"a stage needs at least one layer, got {list(stage_layers)}")
    if sum(stage_layers) != num_layers:
        raise ValueError(
            f"the stages hold {' + '.join(map(str, stage_layers))} = {sum(stage_layers)} layers, "
            f"but the model has {num_layers}"
        )
