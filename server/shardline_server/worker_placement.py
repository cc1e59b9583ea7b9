"""The placement of an engine's workers, over the nodes that have come or on this one alone."""

from collections.abc import Sequence
from pathlib import Path

from shardline_server.engine_config import EngineConfig
from shardline_server.model_facts import read_model_facts
from shardline_server.node_capacity import own_capacity
from shardline_server.placement import Capacity, Placement, PlacementRules, place_workers
from shardline_shards.weight_sizes import read_weight_sizes

VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_ASSUMED_BITS_PER_S = 10e9


def place_on(config: EngineConfig, nodes: Sequence[Capacity]) -> Placement:
    """The placement on these nodes. Raises ConfigError, which says what would fit."""
    return place_workers(config.layout, nodes, _rules(config))


def place_alone(config: EngineConfig) -> Placement:
    """The placement on this node. Raises ConfigError if the weights do not fit its memory."""
    return place_on(config, [own_capacity(config.device)])


def _rules(config: EngineConfig) -> PlacementRules:
    has_weights = config.load_format != "dummy"
    num_layers = sum(config.layout.stage_layers)
    nodes = config.nodes
    return PlacementRules(
        num_places=nodes.num_places if nodes else None,
        may_cross_nodes=nodes.may_cross_nodes if nodes else False,
        has_fixed_stages=config.has_fixed_stages,
        weights=read_weight_sizes(Path(config.model_path), num_layers) if has_weights else None,
        times=config.layer_times,
        value_bytes=VALUE_BYTES[config.dtype],
        kv_memory_bytes=config.kv_memory_bytes or 0,
    )


def describe_crossing(
    config: EngineConfig, placement: Placement, round_trip_s: float
) -> str | None:
    """What shards on several nodes will cost in each step; None where no stage has any.

    Shards add up partial results twice in each layer: `2 L` rounds, in each of which a rank sends
    `(t - 1) h b` bytes for each token and waits half a round trip for the others.
    """
    stages, layout = placement.crossing_stages(), placement.layout
    if not stages:
        return None
    hidden_size = read_model_facts(Path(config.model_path)).hidden_size
    num_rounds = 2 * sum(layout.stage_layers[stage] for stage in stages)
    token_bytes = num_rounds * (layout.tp - 1) * hidden_size * VALUE_BYTES[config.dtype]
    decode_ms, prefill_ms = (
        1e3 * (num_rounds * round_trip_s / 2 + tokens * token_bytes * 8 / _ASSUMED_BITS_PER_S)
        for tokens in (1, config.max_num_batched_tokens)
    )
    return (
        f"shards of stage {', '.join(map(str, stages))} lie on several nodes: each token costs "
        f"every rank {token_bytes / 1024:.1f} KiB in {num_rounds} rounds over the network; at the "
        f"measured round trip of {round_trip_s * 1e3:.2f} ms and an assumed 10 Gbit/s that adds "
        f"{decode_ms:.1f} ms to a step of 1 token and {prefill_ms:.1f} ms to one of "
        f"{config.max_num_batched_tokens}"
    )
