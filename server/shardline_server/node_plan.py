"""What settings and launcher say about nodes: how many, where they meet, and who this one is."""

import secrets
import socket

import psutil

from shardline_server.engine_config import BoardAddress, NodesConfig
from shardline_server.errors import ConfigError
from shardline_server.node_agent import NodeSettings
from shardline_server.node_launchers import Launch
from shardline_server.placement import Capacity, PlacementRules, place_workers
from shardline_server.rendezvous import own_address, parse_board
from shardline_server.settings import ServeSettings
from shardline_shards.layout import ParallelLayout

# What the operator types once for each node where a launcher starts the same command on all.
_AGREED = (
    *("tp", "pp", "stage_layers", "dtype", "device", "load_format", "seed"),
    *("node_gpus", "allow_tp_across_nodes"),
)


def plan_head(settings: ServeSettings, launch: Launch | None) -> tuple[str, NodesConfig | None]:
    """The address that engine and workers use, and what other nodes need. Raises ConfigError."""
    num_nodes = _count_nodes(settings, launch)
    own = _chosen_address(settings)
    if num_nodes == 1:
        _check_alone(settings)
        return own or "127.0.0.1", None
    _check_places(num_nodes, settings)
    board = _find_board(settings, launch)
    nodes = NodesConfig(
        num_nodes=num_nodes,
        board=board,
        secret=_find_secret(settings, launch),
        model=settings.model,
        agreed=_agreed(settings),
        join_timeout_s=settings.join_timeout,
        launcher=launch.launcher if launch else None,
        num_places=settings.node_gpus,
        may_cross_nodes=settings.allow_tp_across_nodes,
    )
    return own or own_address(board.host, board.port), nodes


def plan_node(settings: ServeSettings, launch: Launch) -> NodeSettings:
    """What this process does as another node than the head. Raises ConfigError."""
    _check_places(_count_nodes(settings, launch), settings)
    return NodeSettings(
        board=_find_board(settings, launch),
        secret=_find_secret(settings, launch),
        model=settings.model,
        address=_chosen_address(settings),
        cache=settings.cache,
        join_timeout=settings.join_timeout,
        number=launch.node_index,
        agreed=_agreed(settings),
    )


def find_address(iface: str) -> str:
    """The IPv4 address of a network interface of this node. Raises ConfigError."""
    interfaces = psutil.net_if_addrs()
    if iface not in interfaces:
        raise ConfigError(f"--iface {iface}: this node has {', '.join(sorted(interfaces))}")
    for address in interfaces[iface]:
        if address.family == socket.AF_INET:
            return address.address
    raise ConfigError(f"--iface {iface} has no IPv4 address")


def _chosen_address(settings: ServeSettings) -> str | None:
    """This node's own address, if the operator has named one."""
    return find_address(settings.iface) if settings.iface else settings.internal_host


def _count_nodes(settings: ServeSettings, launch: Launch | None) -> int:
    if launch is None:
        return settings.nodes or 1
    if settings.nodes not in (None, launch.num_nodes):
        raise ConfigError(
            f"--nodes is {settings.nodes} and {launch.launcher} has started {launch.num_nodes}; "
            "leave --nodes out"
        )
    return launch.num_nodes


def _check_alone(settings: ServeSettings) -> None:
    for name in ("rendezvous", "node_gpus", "allow_tp_across_nodes"):
        if getattr(settings, name):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is about several nodes; say how many by --nodes")


def _check_places(num_nodes: int, settings: ServeSettings) -> None:
    """Whether the nodes can hold the stages, as far as it is known before they have come."""
    places = settings.node_gpus or (1,) * num_nodes
    if len(places) != num_nodes:
        raise ConfigError(f"--node-gpus names {len(places)} nodes and there are {num_nodes}")
    rules = PlacementRules(
        num_places=settings.node_gpus, may_cross_nodes=settings.allow_tp_across_nodes
    )
    nodes = [Capacity(is_cuda=False, num_devices=count) for count in places]
    place_workers(ParallelLayout(tp=settings.tp, stage_layers=(1,) * settings.pp), nodes, rules)


def _find_board(settings: ServeSettings, launch: Launch | None) -> BoardAddress:
    if settings.rendezvous is not None:
        is_only_here = launch is None  # a launcher gives the same command to nodes that join
        own = _chosen_address(settings) if is_only_here else None
        return parse_board(settings.rendezvous, own)
    if launch is not None:
        return launch.board
    raise ConfigError(
        f"nodes is {settings.nodes}: name an address of this node as rendezvous, "
        "such as --rendezvous 10.0.0.1:29500"
    )


def _find_secret(settings: ServeSettings, launch: Launch | None) -> str:
    if settings.secret is not None:
        return settings.secret.get_secret_value()
    if launch is None:
        return secrets.token_urlsafe(16)
    raise ConfigError(
        f"{launch.launcher} has started {launch.num_nodes} nodes that have no secret in common; "
        "set SHARDLINE_SECRET to the same text on all of them"
    )


def _agreed(settings: ServeSettings) -> dict[str, str]:
    return {name: str(getattr(settings, name)) for name in _AGREED}
