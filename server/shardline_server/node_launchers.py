"""Launchers that start the same command on every node, and what their variables tell us.

One reader for each; `torchrun` sets what https://docs.pytorch.org/docs/stable/elastic/run.html
lists, `srun` the output variables of its manual page.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardline_server.engine_config import BoardAddress
from shardline_server.errors import ConfigError

# Below the ports that Linux gives to connections, and above those of well-known services.
_FIRST_SLURM_PORT = 20_000
_NUM_SLURM_PORTS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """This process is node `node_index` of `num_nodes` that `launcher` has started; 0 is the head.

    All can find each other at `board`.
    """

    launcher: str
    num_nodes: int
    node_index: int
    board: BoardAddress


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """What the innermost launcher says; None without one, or if it has started this process alone.

    Raises ConfigError if it has started more than one process on a node, or says too little.
    """
    try:
        found = next((launch for read in _READERS if (launch := read(environment))), None)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"a launcher's variables are not as they should be: {error}") from error
    return found if found is not None and found.num_nodes > 1 else None


def _read_torchrun(environment: Mapping[str, str]) -> Launch | None:
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    num_nodes = int(environment["GROUP_WORLD_SIZE"])
    _check_one_each("torchrun", num_nodes, int(environment["WORLD_SIZE"]), "--nproc-per-node 1")
    attempt = f"{environment['TORCHELASTIC_RUN_ID']}/{environment['TORCHELASTIC_RESTART_COUNT']}"
    board = BoardAddress(
        host=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        prefix=f"shardline/{attempt}",
        is_kept_by_launcher=environment["TORCHELASTIC_USE_AGENT_STORE"] == "True",
    )
    node_index = int(environment["GROUP_RANK"])
    return Launch(launcher="torchrun", num_nodes=num_nodes, node_index=node_index, board=board)


def _read_srun(environment: Mapping[str, str]) -> Launch | None:
    if "SLURM_STEP_ID" not in environment:  # a batch script has the other variables as well
        return None
    num_nodes = int(environment["SLURM_STEP_NUM_NODES"])
    num_tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    _check_one_each("srun", num_nodes, num_tasks, "--ntasks-per-node 1")
    board = BoardAddress(
        host=_first_host(environment["SLURM_STEP_NODELIST"]), port=_slurm_port(environment)
    )
    node_index = int(environment["SLURM_NODEID"])
    return Launch(launcher="srun", num_nodes=num_nodes, node_index=node_index, board=board)


# torchrun first: srun may have started it, and its tasks still see what srun says.
_READERS: tuple[Callable[[Mapping[str, str]], Launch | None], ...] = (_read_torchrun, _read_srun)


def _check_one_each(launcher: str, num_nodes: int, num_processes: int, remedy: str) -> None:
    if num_processes != num_nodes:
        raise ConfigError(
            f"{launcher} has started {num_processes} processes on {num_nodes} nodes; Shardline "
            f"needs one on each node and starts its workers itself: use {launcher} {remedy}"
        )


def _first_host(nodes: str) -> str:
    """The first name of a SLURM host list, such as `gpu[07-09,12],login1`."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise ConfigError(f"SLURM_STEP_NODELIST {nodes!r} names no node; give --rendezvous")
    name, number, suffix = found.groups(default="")
    return f"{name}{number}{suffix}"


def _slurm_port(environment: Mapping[str, str]) -> int:
    """The first port that SLURM reserved for the step, else one that follows from its number."""
    reserved = environment.get("SLURM_STEP_RESV_PORTS")
    if reserved:
        return int(re.split("[-,]", reserved)[0])
    step = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return _FIRST_SLURM_PORT + step % _NUM_SLURM_PORTS
