"""Where `serve --nodes` would put workers and layers, told without any other node."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from pydantic import ByteSize, TypeAdapter, ValidationError

from shardline_server.engine_config import EngineConfig
from shardline_server.engine_launch import plan_engine
from shardline_server.errors import ConfigError
from shardline_server.node_capacity import own_capacity
from shardline_server.placement import Capacity
from shardline_server.plan.memory import StageMemory, stage_memory
from shardline_server.settings import ServeSettings
from shardline_server.worker_placement import place_on

_NOWHERE = "127.0.0.1:1"  # nobody is to come


@dataclass(frozen=True, kw_only=True, slots=True)
class NodesPlan:
    """`config` has the layout that the nodes' memory allows; `ranks` are those of each node."""

    config: EngineConfig
    nodes: list[Capacity]
    ranks: list[range]
    stages: list[StageMemory]


def find_nodes_plan(
    settings: ServeSettings, model_path: Path, node_memory: Sequence[int] | None
) -> NodesPlan:
    """For nodes with so many bytes free each, on the GPU with the least or for all workers of a
    node on CPUs; like this one, where nothing is said. Raises ConfigError.
    """
    num_nodes = settings.nodes
    assert num_nodes is not None
    if node_memory is not None and len(node_memory) != num_nodes:
        raise ConfigError(f"--node-memory names {len(node_memory)} nodes and there are {num_nodes}")
    config = plan_engine(settings.model_copy(update={"rendezvous": _NOWHERE}), model_path)
    own = own_capacity(config.device)
    free: Sequence[int | None] = node_memory or [own.free_bytes] * num_nodes
    gpus = settings.node_gpus if own.is_cuda else None
    counts = gpus or [own.num_devices] * num_nodes
    nodes = [
        Capacity(is_cuda=own.is_cuda, num_devices=num_devices, free_bytes=free_bytes)
        for num_devices, free_bytes in zip(counts, free, strict=True)
    ]
    placement = place_on(config, nodes)
    config = msgspec.structs.replace(config, layout=placement.layout)
    return NodesPlan(config=config, nodes=nodes, ranks=placement.ranks, stages=stage_memory(config))


def parse_memory(text: str | None) -> tuple[int, ...] | None:
    """What `--node-memory` says, in bytes. Raises ConfigError."""
    if text is None:
        return None
    try:
        return tuple(map(int, TypeAdapter(tuple[ByteSize, ...]).validate_python(text.split(","))))
    except ValidationError as error:
        raise ConfigError(f"--node-memory {text}: write sizes such as 80GiB,24GiB") from error
