"""How much KV memory the workers of this host would find, told from headers and free memory."""

from dataclasses import dataclass
from pathlib import Path

from shardline_server.engine_config import EngineConfig
from shardline_server.local_workers import free_memory_share
from shardline_server.model_facts import ModelFacts, read_model_facts
from shardline_server.node_capacity import own_capacity
from shardline_server.worker_placement import VALUE_BYTES
from shardline_shards.layout import deal_heads
from shardline_shards.weight_sizes import read_weight_sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Of the fullest rank of a stage, in bytes: its part of the weights (None: not known before
    they are read), and one block of KV memory.
    """

    weight_bytes: int | None
    block_bytes: int


def stage_memory(config: EngineConfig) -> list[StageMemory]:
    """What each stage holds."""
    facts = read_model_facts(Path(config.model_path))
    return [
        StageMemory(weight_bytes=weight_bytes, block_bytes=_block_bytes(config, facts, stage_index))
        for stage_index, weight_bytes in enumerate(_weights_of_ranks(config))
    ]


def estimate_blocks(config: EngineConfig, stages: list[StageMemory]) -> int | None:
    """Blocks of KV memory on the rank that has room for the fewest; None where nobody can tell."""
    rooms = [_kv_room(config, stage, stages) for stage in stages]
    counts = [
        room // stage.block_bytes
        for room, stage in zip(rooms, stages, strict=True)
        if room is not None
    ]
    return min(*counts, config.max_kv_blocks) if len(counts) == len(stages) else None


def _weights_of_ranks(config: EngineConfig) -> list[int | None]:
    """A shard of each stage's weights; the shards of a stage are taken to be alike."""
    layout = config.layout
    sizes = read_weight_sizes(Path(config.model_path), sum(layout.stage_layers))
    if sizes is None:
        return [None] * layout.pp
    scaled, last = sizes.scaled(VALUE_BYTES[config.dtype]), layout.pp - 1
    totals = [sum(scaled.layers[layer] for layer in layout.layers(i)) for i in range(layout.pp)]
    totals[0] += scaled.prologue
    # A head that is the embedding again is held once where one stage has both.
    totals[last] += scaled.epilogue - (scaled.prologue if scaled.is_tied and last == 0 else 0)
    return [-(-total // layout.tp) for total in totals]


def _block_bytes(config: EngineConfig, facts: ModelFacts, stage_index: int) -> int:
    shares = deal_heads(facts.num_query_heads, facts.num_kv_heads, config.layout.tp)
    num_heads = max(len(share.kv_heads) for share in shares)
    values = 2 * config.block_size * num_heads * facts.head_dim
    return values * VALUE_BYTES[config.dtype] * config.layout.stage_layers[stage_index]


def _kv_room(config: EngineConfig, stage: StageMemory, stages: list[StageMemory]) -> int | None:
    """Bytes for KV on a rank: what is asked for, else its share of what weights leave free."""
    if config.kv_memory_bytes is not None:
        return config.kv_memory_bytes
    free_bytes = own_capacity(config.device).free_bytes
    held = [other.weight_bytes for other in ([stage] if config.device == "cuda" else stages)]
    if free_bytes is None or None in held:
        return None
    loaded_bytes = sum(size or 0 for size in held)
    loaded_bytes *= 1 if config.device == "cuda" else config.layout.tp
    share = free_memory_share(config.device, config.layout.world_size)
    return int(max(0, free_bytes - loaded_bytes) * share)
