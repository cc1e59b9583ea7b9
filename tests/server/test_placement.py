"""Who runs where: by places, by memory, and what is said when it does not fit."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import save_tiny

from shardline_server.errors import ConfigError
from shardline_server.placement import Capacity, Placement, PlacementRules, place_workers
from shardline_shards.layout import ParallelLayout, even_stages
from shardline_shards.partition import LayerTimes
from shardline_shards.weight_sizes import WeightSizes, read_weight_sizes

GB = 10**9


def cpus(num_cores: int = 2, free_bytes: int | None = None) -> Capacity:
    return Capacity(is_cuda=False, num_devices=num_cores, free_bytes=free_bytes)


def gpus(num: int, free_bytes: int | None = None) -> Capacity:
    return Capacity(is_cuda=True, num_devices=num, free_bytes=free_bytes)


def place(tp: int, pp: int, *nodes: Capacity, layers: int = 32, **rules: object) -> Placement:
    layout = ParallelLayout(tp=tp, stage_layers=even_stages(layers, pp))
    return place_workers(layout, nodes, PlacementRules(**rules))  # type: ignore[arg-type]


def refusal(*args, **rules) -> str:
    with pytest.raises(ConfigError) as caught:
        place(*args, **rules)
    return caught.value.message


@pytest.mark.parametrize(
    ("tp", "pp", "nodes", "rules", "ranks"),
    [
        (2, 3, (cpus(), cpus()), {}, [range(0, 4), range(4, 6)]),
        (1, 4, (cpus(6), cpus(2)), {}, [range(0, 3), range(3, 4)]),
        (2, 6, (gpus(8), gpus(4)), {}, [range(0, 8), range(8, 12)]),
        (4, 3, (gpus(5), gpus(9)), {}, [range(0, 4), range(4, 12)]),
        (1, 3, (cpus(), cpus()), {"num_places": (1, 2)}, [range(0, 1), range(1, 3)]),
        (2, 1, (cpus(), cpus()), {"may_cross_nodes": True}, [range(0, 1), range(1, 2)]),
        (2, 2, (gpus(3), gpus(1)), {"may_cross_nodes": True}, [range(0, 3), range(3, 4)]),
        (2, 2, (gpus(2), gpus(2)), {"may_cross_nodes": True}, [range(0, 2), range(2, 4)]),
    ],
)
def test_ranks_go_to_nodes_by_what_they_have(tp, pp, nodes, rules, ranks) -> None:
    assert place(tp, pp, *nodes, **rules).ranks == ranks


def test_only_stages_that_lie_on_several_nodes_cross() -> None:
    placement = place(2, 2, gpus(3), gpus(1), may_cross_nodes=True)
    assert placement.crossing_stages() == [1]
    assert place(2, 2, gpus(2), gpus(2), may_cross_nodes=True).crossing_stages() == []


@pytest.mark.parametrize(
    ("tp", "pp", "nodes", "rules", "words"),
    [
        (1, 1, (cpus(), cpus()), {}, "--pp 1 --tp 1 do not fit 2 nodes: .*; --pp 2 would fit"),
        (2, 6, (gpus(8), gpus(3)), {}, "2 nodes with 8 [+] 3 places.*--pp 5 or --tp 1 would fit"),
        (2, 4, (gpus(7), gpus(1)), {}, "--tp 1 or --allow-tp-across-nodes, at a cost, would fit"),
        (1, 4, (cpus(), cpus()), {"num_places": (1, 2)}, "1 [+] 2 places.*--pp 3 would fit"),
        (2, 1, (gpus(8), gpus(8)), {}, "--pp 2 or --allow-tp-across-nodes"),
        (1, 1, (gpus(1), gpus(0)), {}, "add GPUs, or take nodes out"),
    ],
)
def test_more_than_the_nodes_hold_is_refused_with_what_would_fit(
    tp, pp, nodes, rules, words
) -> None:
    with pytest.raises(ConfigError, match=words):
        place(tp, pp, *nodes, **rules)


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.lists(st.integers(0, 8).map(gpus), min_size=1, max_size=4),
    st.booleans(),
)
def test_every_rank_has_a_gpu_and_every_node_a_rank(tp, pp, nodes, may_cross) -> None:
    try:
        placement = place(tp, pp, *nodes, may_cross_nodes=may_cross)
    except ConfigError:
        return
    assert [rank for ranks in placement.ranks for rank in ranks] == list(range(tp * pp))
    for node, ranks in zip(nodes, placement.ranks, strict=True):
        assert 1 <= len(ranks) <= node.num_devices
    assert may_cross or not placement.crossing_stages()


WEIGHTS = {"weights": WeightSizes((GB // 4,) * 8, GB // 4, GB // 4), "value_bytes": 4}
"""Eight layers of a gigabyte, and one at each end."""


def layers_of(*nodes: Capacity, pp: int = 2, **rules: object) -> tuple[int, ...]:
    return place(1, pp, *nodes, layers=8, **WEIGHTS | rules).layout.stage_layers


def test_layers_move_to_where_memory_is() -> None:
    assert layers_of(cpus(), cpus()) == (4, 4)
    assert layers_of(cpus(2, 8 * GB), cpus(2, 8 * GB)) == (4, 4)
    assert layers_of(cpus(2, 4 * GB), cpus(2, 20 * GB)) == (2, 6)
    assert layers_of(gpus(1, 20 * GB), gpus(1, 4 * GB)) == (6, 2)


def test_workers_of_one_node_share_its_memory_but_not_that_of_its_gpus() -> None:
    assert layers_of(cpus(4, 20 * GB), cpus(1, 3 * GB), pp=3) == (4, 3, 1)
    assert layers_of(gpus(2, 4 * GB), gpus(1, 12 * GB), pp=3) == (2, 3, 3)


def test_kv_memory_comes_off_what_weights_can_have() -> None:
    assert layers_of(cpus(2, 8 * GB), cpus(2, 20 * GB)) == (4, 4)
    assert layers_of(cpus(2, 8 * GB), cpus(2, 20 * GB), kv_memory_bytes=4 * GB) == (2, 6)
    assert layers_of(cpus(2, 8 * GB), cpus(2, 20 * GB), kv_memory_bytes=99 * GB) == (4, 4)


def test_layers_that_have_to_move_do_so_by_their_times() -> None:
    times = LayerTimes(0.0, 0.0, (1.0,) * 7 + (3.0,), 0.0)
    nodes = (cpus(2, 4 * GB), cpus(2, 8 * GB), cpus(2, 8 * GB))
    assert layers_of(*nodes, pp=3, times=times) == (2, 4, 2)


def test_weights_that_do_not_fit_are_refused_with_what_would() -> None:
    message = refusal(1, 2, gpus(1, 4 * GB), gpus(3, 4 * GB), layers=8, **WEIGHTS)
    assert "10.000 GB of weights, 1.000 a layer, do not fit --pp 2" in message
    assert "3.600 for the 4 layers of stage 0" in message
    assert "--pp 4 would fit" in message
    message = refusal(1, 2, cpus(2, 2 * GB), cpus(2, 2 * GB), layers=8, **WEIGHTS)
    assert "it takes more memory, or a smaller --dtype" in message


def test_stages_that_the_operator_chose_stay_or_are_refused() -> None:
    nodes = (cpus(2, 4 * GB), cpus(2, 20 * GB))
    message = refusal(1, 2, *nodes, layers=8, has_fixed_stages=True, **WEIGHTS)
    assert "3.600 for the 4 layers of stage 0" in message
    assert "--stage-layers 2,6 would fit" in message


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_sizes_of_weights_as_their_files_tell(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    sizes = read_weight_sizes(folder, num_layers=3)
    assert sizes is not None
    num_values = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    is_tied = family == "llama"
    total = sum(sizes.layers) + sizes.prologue + sizes.epilogue
    assert total == num_values + is_tied * embedding
    assert sizes.prologue == embedding
    assert len(set(sizes.layers)) == 1


def test_a_damaged_file_has_no_sizes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    assert read_weight_sizes(tmp_path, num_layers=3) is None
