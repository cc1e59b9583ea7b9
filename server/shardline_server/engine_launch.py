"""From settings to a running engine process."""

import os
import socket
import subprocess
from pathlib import Path

from msgspec.structs import replace

from shardline_server.child import (
    configure_child_process,
    prepare_child_process,
    stop_child_processes,
)
from shardline_server.engine_config import EngineConfig
from shardline_server.engine_signals import LEAVE
from shardline_server.errors import ConfigError
from shardline_server.layer_profile import find_layer_times
from shardline_server.model_facts import ModelFacts, read_model_facts
from shardline_server.node_capacity import count_gpus
from shardline_server.node_launchers import Launch
from shardline_server.node_plan import plan_head
from shardline_server.settings import ServeSettings
from shardline_shards.gate import LaunchKeys
from shardline_shards.layout import ParallelLayout, check_stages, even_stages
from shardline_shards.partition import LayerTimes, cut_stages
from shardline_shards.wire import Wire, wire_pair


def check_split(settings: ServeSettings, facts: ModelFacts) -> None:
    """Raises ConfigError, with the numbers, if the model cannot be spread as asked."""
    if settings.tp > facts.num_query_heads:
        raise ConfigError(
            f"--tp {settings.tp} is more than the model's {facts.num_query_heads} query heads"
        )
    if settings.pp > facts.num_layers:
        raise ConfigError(f"--pp {settings.pp} is more than the model's {facts.num_layers} layers")
    if settings.stage_layers is None:
        return
    try:
        check_stages(settings.stage_layers, facts.num_layers)
    except ValueError as error:
        raise ConfigError(f"--stage-layers: {error}") from error


def plan_layout(
    settings: ServeSettings, facts: ModelFacts, times: LayerTimes | None
) -> ParallelLayout:
    """How the model is spread: stages as asked, else by what layers take, else evenly."""
    stage_layers = settings.stage_layers
    if stage_layers is None and times is not None:
        stage_layers = cut_stages(times, settings.pp)
    return ParallelLayout(
        tp=settings.tp, stage_layers=stage_layers or even_stages(facts.num_layers, settings.pp)
    )


def plan_engine(
    settings: ServeSettings, model_path: Path, launch: Launch | None = None
) -> EngineConfig:
    """The engine's configuration. Raises ConfigError."""
    facts = read_model_facts(model_path)
    if settings.max_model_len is not None and settings.max_model_len > facts.max_model_len:
        raise ConfigError(
            f"--max-model-len {settings.max_model_len} is more than the {facts.max_model_len} "
            "tokens that the model was made for"
        )
    check_split(settings, facts)
    host, nodes = plan_head(settings, launch)
    _check_is_ours(host)
    device = choose_device(settings.device, settings.tp * settings.pp if nodes is None else 1)
    dtype = (facts.dtype or "bfloat16") if settings.dtype == "auto" else settings.dtype
    num_local = -(-settings.tp * settings.pp // (nodes.num_nodes if nodes else 1))
    times = find_layer_times(settings, model_path, dtype, device, num_local)
    layout = plan_layout(settings, facts, times)
    return EngineConfig(
        parent_pid=os.getpid(),
        keys=LaunchKeys.create(),
        host=host,
        model_path=str(model_path),
        load_format=settings.load_format,
        layout=layout,
        has_fixed_stages=settings.stage_layers is not None,
        dtype=dtype,
        device=device,
        seed=settings.seed,
        vocab_size=facts.vocab_size,
        max_model_len=settings.max_model_len or facts.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_num_waiting=settings.max_num_waiting,
        max_in_flight=settings.max_in_flight,
        block_size=choose_block_size(settings.block_size, device),
        kv_memory_bytes=int(settings.kv_memory) if settings.kv_memory else None,
        num_kv_blocks=settings.num_kv_blocks,
        enable_prefix_caching=settings.enable_prefix_caching,
        threads_per_worker=settings.threads_per_worker,
        log_level=settings.log_level,
        policy=settings.policy,
        measure_s=settings.measure_seconds,
        cache_dir=str(settings.cache),
        nodes=nodes,
        layer_times=times,
        keeps_spare=settings.spare_worker,
        has_cuda_graphs=settings.cuda_graphs,
        plans_ahead=choose_plans_ahead(settings, device),
    )


def _check_is_ours(host: str) -> None:
    try:
        socket.create_server((host, 0)).close()
    except OSError as error:
        raise ConfigError(
            f"{host} is no address of this host ({error.strerror}); engine and workers need one: "
            "see --iface and --internal-host, or --rendezvous for several nodes"
        ) from error


def choose_block_size(wanted: int | None, device: str) -> int:
    """Tokens in a block; the paged kernel on CUDA reads whole pages of 256."""
    unit = 256 if device == "cuda" else 1
    if wanted is not None and wanted % unit:
        raise ConfigError(f"--block-size {wanted}: on CUDA it has to be a multiple of {unit}")
    return wanted or max(unit, 16)


def choose_plans_ahead(settings: ServeSettings, device: str) -> bool:
    """As asked; else with several stages on CPUs, where it was measured, or with one on CUDA."""
    if settings.async_scheduling is not None:
        return settings.async_scheduling
    has_several = settings.pp > 1
    pays = has_several if device == "cpu" else not has_several
    return pays and settings.max_in_flight is None


def choose_device(wanted: str, num_workers: int) -> str:
    """`auto` takes CUDA if there is a GPU for every worker that this node certainly runs."""
    num_gpus = count_gpus()
    if wanted == "auto":
        return "cuda" if num_gpus >= num_workers else "cpu"
    if wanted == "cuda" and num_gpus < num_workers:
        raise ConfigError(
            f"--device cuda: {num_workers} workers need a GPU each, this host has {num_gpus}"
        )
    return wanted


class EngineProcess:
    """The engine as a child of this process. `keys` let other front ends in, where it listens."""

    def __init__(self, config: EngineConfig) -> None:
        self.keys = config.keys.client
        self._wire, theirs = wire_pair()
        with theirs:
            descriptor = theirs.fileno()
            self._process = prepare_child_process(
                "shardline_server.engine", descriptors=(descriptor,)
            )
        configure_child_process(self._process, replace(config, frontend_wire=descriptor))
        self.pid = self._process.pid

    def wait_begun(self) -> Wire:
        """Wait until the engine listens; whoever takes the wire closes it.

        Raises ConfigError if the engine ends instead.
        """
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            self._wire.close()
            raise ConfigError("the engine process ended before it listened; see its log")
        return self._wire

    @property
    def has_refused(self) -> bool:
        """Whether it has ended for what the operator can mend; see `engine.main`."""
        return self._process.returncode == 2

    def wait(self) -> int:
        """Wait for the engine's end; returns its exit status."""
        return self._process.wait()

    def stop(self) -> None:
        """Ask the engine to leave, and see that it does."""
        self._wire.close()
        self._process.send_signal(LEAVE)
        try:
            self._process.wait(timeout=3.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
        stop_child_processes([self._process])
