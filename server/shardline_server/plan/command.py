"""What `serve` would do with these settings on this host, found out and printed."""

import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console

from shardline_scheduler import PipeModel, Scheduler
from shardline_server.engine_config import EngineConfig
from shardline_server.engine_launch import plan_engine
from shardline_server.errors import ConfigError
from shardline_server.plan.memory import StageMemory, estimate_blocks, stage_memory
from shardline_server.plan.nodes import find_nodes_plan, parse_memory
from shardline_server.plan.report import print_costs, print_nodes, print_split, print_times
from shardline_server.settings import ServeSettings
from shardline_server.step_costs import CostCache, StepCosts
from shardline_server.worker_group import WorkerFailed, WorkerGroup
from shardline_server.worker_placement import place_alone
from shardline_shards.gate import Gate
from shardline_shards.sources import resolve_model

logger = logging.getLogger("shardline.plan")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServePlan:
    """`config` has the layout that memory allows. `num_blocks` are of KV memory, counted by workers
    if `is_counted`, else estimated; None where nobody can tell. `model` is None if nothing was to
    be measured.
    """

    config: EngineConfig
    stages: list[StageMemory]
    num_blocks: int | None
    is_counted: bool
    model: PipeModel | None


def print_plan(settings: ServeSettings, *, explain: bool, node_memory: str | None = None) -> None:
    """Print the plan. Raises ConfigError and ShardError for what the operator can mend."""
    console, memory = Console(width=100, highlight=False), parse_memory(node_memory)
    if settings.nodes not in (None, 1):
        print_nodes(console, find_nodes_plan(settings, _find_model(settings), memory))
        return
    if memory is not None:
        raise ConfigError("--node-memory is about several nodes; say how many by --nodes")
    plan = find_plan(settings)
    print_split(console, plan.config, plan.stages, plan.num_blocks, is_counted=plan.is_counted)
    if plan.model is None:
        console.print("What steps take is not known, and --measure-seconds 0 measures nothing.")
        return
    print_times(console, plan.config, plan.model)
    if explain:
        print_costs(console, plan.model)


def find_plan(settings: ServeSettings) -> ServePlan:
    """For this host alone: from what is kept of earlier starts, else by starting the workers and
    measuring.
    """
    config = plan_engine(settings, _find_model(settings))
    config = msgspec.structs.replace(config, layout=place_alone(config).layout)
    stages = stage_memory(config)
    model = CostCache(Path(config.cache_dir), config).load()
    if model is not None or not config.measure_s:
        num_blocks = estimate_blocks(config, stages)
        return ServePlan(
            config=config, stages=stages, num_blocks=num_blocks, is_counted=False, model=model
        )
    num_blocks, model = _measure(config)
    return ServePlan(
        config=config, stages=stages, num_blocks=num_blocks, is_counted=True, model=model
    )


def _find_model(settings: ServeSettings) -> Path:
    needs_weights = settings.load_format != "dummy"
    return resolve_model(settings.model, cache_dir=settings.cache, needs_weights=needs_weights)


def _measure(config: EngineConfig) -> tuple[int, PipeModel]:
    """Start the workers as `serve` would, and measure what steps take; it is kept for `serve`."""
    logger.info("no start before this one has kept what steps take; measuring")
    gate = Gate(config.keys)
    workers = WorkerGroup(config, gate)
    try:
        num_blocks = workers.start()
        scheduler = Scheduler(config.scheduler_config(num_blocks))
        cache = CostCache(Path(config.cache_dir), config)
        StepCosts(
            scheduler, workers, cache, config.measure_s, vocab_size=config.vocab_size
        ).measure()
    except WorkerFailed as failure:
        raise ConfigError(str(failure)) from failure
    finally:
        workers.kill()
        gate.close()
    return num_blocks, scheduler.cost_model
