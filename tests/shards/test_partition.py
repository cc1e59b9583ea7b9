"""The cut into stages, against trying every one."""

from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline_shards.layout import even_stages
from shardline_shards.partition import LayerTimes, StageRoom, cut_stages

seconds = st.floats(0.0, 10.0, allow_subnormal=False)
sizes = st.integers(0, 20).map(float)


def all_cuts(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    cuts = []
    for inner in combinations(range(1, num_layers), num_stages - 1):
        ends = (0, *inner, num_layers)
        cuts.append(tuple(b - a for a, b in pairwise(ends)))
    return cuts


def fits(room: StageRoom, cut: tuple[int, ...]) -> bool:
    ends = [0, *accumulate(cut)]
    used = [sum(room.layer_bytes[a:b]) for a, b in pairwise(ends)]
    used[0] += room.prologue_bytes
    used[-1] += room.epilogue_bytes
    return all(total <= limit for total, limit in zip(used, room.limits, strict=True))


@given(data=st.data())
def test_no_cut_that_fits_has_a_faster_slowest_stage(data: st.DataObject) -> None:
    layers = data.draw(st.lists(seconds, min_size=1, max_size=8))
    num_stages = data.draw(st.integers(1, min(4, len(layers))))
    times = LayerTimes(data.draw(seconds), data.draw(seconds), tuple(layers), data.draw(seconds))
    room = StageRoom(
        data.draw(st.lists(sizes, min_size=len(layers), max_size=len(layers))),
        data.draw(sizes),
        data.draw(sizes),
        data.draw(st.lists(st.integers(0, 80), min_size=num_stages, max_size=num_stages)),
    )
    possible = [cut for cut in all_cuts(len(layers), num_stages) if fits(room, cut)]
    cut = cut_stages(times, num_stages, room)
    if not possible:
        assert cut is None
        return
    assert cut in possible
    fastest = min(max(times.stage_times(other)) for other in possible)
    assert max(times.stage_times(cut)) == pytest.approx(fastest)
    equals = [other for other in possible if max(times.stage_times(other)) <= fastest]
    least = min(sum(s**2 for s in times.stage_times(other)) for other in equals)
    assert sum(s**2 for s in times.stage_times(cut)) <= least * (1 + 1e-6) + 1e-12


@given(num_layers=st.integers(1, 40), data=st.data())
def test_equal_layers_are_dealt_evenly(num_layers: int, data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, min(8, num_layers)))
    times = LayerTimes(0.5, 0.0, (1.0,) * num_layers, 0.0)
    assert cut_stages(times, num_stages) == even_stages(num_layers, num_stages)


def test_a_heavy_head_leaves_the_last_stage_fewer_layers() -> None:
    times = LayerTimes(0.0, 0.0, (1.0,) * 30, 6.0)
    assert cut_stages(times, 2) == (18, 12)
    measured = times.scaled((18, 12), [1.0, 0.5])
    assert measured.stage_times((18, 12)) == [18.0, 9.0]
    assert cut_stages(measured, 2) == (14, 16)
