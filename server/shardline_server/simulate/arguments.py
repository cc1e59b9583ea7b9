"""From the command line's values to a simulation."""

from pathlib import Path
from typing import Any

from shardline_scheduler import PipeModel, SchedulerConfig
from shardline_server.errors import ConfigError
from shardline_server.simulate.command import LoadReader, SimulateOptions, run
from shardline_server.simulate.prices import find_costs, given_costs, read_costs
from shardline_shards.cache import default_cache_dir

_BLOCK_SIZE = 16


def simulate_as_said(values: dict[str, Any], read_load: LoadReader) -> None:
    """Runs it; `read_load` understands what is said of the load.

    Raises ConfigError where values are wrong or exclude each other.
    """
    files = values.pop("json_file"), values.pop("png_file")
    model = _model(values)
    try:
        scheduler = SchedulerConfig(
            num_blocks=values.pop("kv_tokens") // _BLOCK_SIZE,
            block_size=_BLOCK_SIZE,
            num_stages=len(model.stages),
            plans_ahead=values.pop("async_scheduling"),
            enable_prefix_cache=False,  # Prompts have lengths alone.
            max_num_waiting=1024,
            **{name: values.pop(name) for name in _SCHEDULER},
        )
        options = SimulateOptions(
            num_replicas=values.pop("replicas"),
            router=values.pop("router"),
            noise=values.pop("noise"),
            max_tokens=values.pop("max_tokens"),
            scheduler=scheduler,
        )
        run(read_load(values), options, model, *files)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


_SCHEDULER = (
    "policy",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_in_flight",
)


def _model(values: dict[str, Any]) -> PipeModel:
    path, text, num_stages = values.pop("costs"), values.pop("cost"), values.pop("stages")
    cache_dir, overhead_ms = values.pop("cache") or default_cache_dir(), values.pop("overhead_ms")
    if path is not None and text is not None:
        raise ConfigError("--costs and --cost say the same; give one of them")
    if text is not None:
        model = given_costs(_parse_costs(text), num_stages)
    elif path is not None:
        model = read_costs(path, num_stages)
    else:
        _, model = find_costs(Path(cache_dir), num_stages)
    if overhead_ms is not None:
        model.trip_overhead_s = overhead_ms / 1e3
    return model


def _parse_costs(text: str) -> list[float]:
    try:
        costs = [float(part) for part in text.split(",")]
    except ValueError:
        costs = []
    if len(costs) != 5 or min(costs) < 0 or costs[0] == 0:
        raise ConfigError(
            f"--cost {text}: five numbers of milliseconds, none below 0 and the first above, such "
            "as 10,0.5,1,0.001,0.0001"
        )
    return costs
