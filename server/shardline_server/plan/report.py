"""The tables of `shardline plan`."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from shardline_scheduler import PipeModel, StageModel, StepLoad
from shardline_scheduler.cost_model import RangeModel, Spread
from shardline_server.engine_config import EngineConfig
from shardline_server.plan.memory import StageMemory
from shardline_server.plan.nodes import NodesPlan

NUM_DECODES, CONTEXT, NUM_PROMPT_TOKENS = 16, 256, 256
_UNITS = (
    ("a: each step", "ms", 1e3),
    ("b: a prompt token", "us", 1e6),
    ("c: a decode", "us", 1e6),
    ("d: its context, a token", "ns", 1e9),
    ("e: a prompt token's context, a token", "ns", 1e9),
)


def print_split(
    console: Console,
    config: EngineConfig,
    stages: Sequence[StageMemory],
    num_blocks: int | None,
    *,
    is_counted: bool,
) -> None:
    """Stages, their layers and bytes, and KV memory."""
    _print_title(console, config)
    table = _table("stage", "layers", "weights of a rank", "a KV block")
    for index, stage in enumerate(stages):
        table.add_row(str(index), *_stage_cells(config, index, stage))
    console.print(table)
    console.print(_kv_line(config, num_blocks, is_counted=is_counted))


def print_nodes(console: Console, plan: NodesPlan) -> None:
    """What each node would run, a row for each of its stages."""
    layout, num_nodes = plan.config.layout, len(plan.nodes)
    _print_title(console, plan.config)
    table = _table("node", "has", "ranks", "stage", "layers", "weights of a rank", "a KV block")
    for node, (capacity, own) in enumerate(zip(plan.nodes, plan.ranks, strict=True)):
        for index in dict.fromkeys(layout.place(rank).stage_index for rank in own):
            ranks = [rank for rank in layout.stage_ranks(index) if rank in own]
            cells = _stage_cells(plan.config, index, plan.stages[index])
            table.add_row(str(node), str(capacity), _span(ranks), str(index), *cells)
    console.print(table)
    console.print(
        f"So it is if {num_nodes} nodes come that have this; where --node-gpus or --node-memory\n"
        "say nothing, they are taken to be like this one. What steps take is measured when they\n"
        "are there.",
        soft_wrap=True,
    )


def _print_title(console: Console, config: EngineConfig) -> None:
    layout = config.layout
    console.print(
        f"{config.model_path}: {layout.pp} stage(s) x {layout.tp} shard(s) on {config.device}, "
        f"{config.dtype}",
        soft_wrap=True,
    )


def _stage_cells(config: EngineConfig, index: int, stage: StageMemory) -> tuple[str, str, str]:
    weights = "unknown" if stage.weight_bytes is None else f"{stage.weight_bytes / 1e6:.1f} MB"
    return _span(config.layout.layers(index)), weights, f"{stage.block_bytes / 1e3:.1f} kB"


def _span(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"{first} to {last}" if first != last else str(first)


def _kv_line(config: EngineConfig, num_blocks: int | None, *, is_counted: bool) -> str:
    if num_blocks is None:
        return "KV memory: as much as is free when the weights are loaded"
    how = "counted by the workers" if is_counted else "estimated from what is free"
    wanted = config.num_kv_blocks
    line = (
        f"KV memory: {num_blocks} blocks of {config.block_size} tokens, "
        f"{num_blocks * config.block_size} tokens in all, {how}"
    )
    return line if wanted is None else f"{line}; {wanted} are asked for"


def print_times(console: Console, config: EngineConfig, model: PipeModel) -> None:
    """What each stage takes of two usual steps, and what a client would see of that."""
    if not model.is_ready:
        console.print("What steps take: too few could be measured; requests will teach it.")
        return
    decodes = StepLoad(0, NUM_DECODES, NUM_DECODES * CONTEXT, 0)
    prompt = StepLoad()
    prompt.add_prefill(NUM_PROMPT_TOKENS, 0)
    kinds = (f"{NUM_DECODES} decodes", f"{NUM_PROMPT_TOKENS} prompt tokens")
    table = _table("predicted ms of a step", *kinds)
    for index, stage in enumerate(model.stages):
        table.add_row(f"stage {index}", *(_times(stage, load) for load in (decodes, prompt)))
    console.print(table)
    scheduler = config.scheduler_config(1)
    in_flight = scheduler.in_flight_limit
    num_streams = scheduler.num_shares * NUM_DECODES
    token_s = max(
        scheduler.num_shares * model.expected_step_seconds(decodes),
        model.gap_seconds(model.trip_seconds(decodes), scheduler.num_trips_at_once),
    )
    console.print(
        f"Alone, the first token of {NUM_PROMPT_TOKENS} takes "
        f"{1e3 * model.expected_trip_seconds(prompt):.0f} ms; with {in_flight} step(s) in flight, "
        f"each of {num_streams} streams gets a token every {1e3 * token_s:.1f} ms. "
        f"Of a step's way {1e3 * model.trip_overhead_s:.2f} ms are not computing.\n"
        "In brackets: what planning reckons with, which nine steps of ten stay below.",
        soft_wrap=True,
    )


def print_costs(console: Console, model: PipeModel) -> None:
    """The coefficients of every stage, in both ranges."""
    console.print(
        "\nA step takes a + b P + c D + d C + e X: P prompt tokens, D decodes, C all tokens of "
        "their contexts, X the tokens before each prompt token.",
        soft_wrap=True,
    )
    for index, stage in enumerate(model.stages):
        table = _table(f"stage {index}", f"up to {stage.knee} tokens", f"above {stage.knee} tokens")
        ranges = (stage.memory_bound, stage.compute_bound)
        for row, (name, unit, factor) in enumerate(_UNITS):
            cells = [_coefficient(part, row, unit, factor) for part in ranges]
            table.add_row(name, *cells)
        with_prompts = (_margin(part, part.with_prompts) for part in ranges)
        table.add_row("nine of ten steps with prompts take", *with_prompts)
        only_decodes = (_margin(part, part.only_decodes) for part in ranges)
        table.add_row("nine of ten steps of decodes only take", *only_decodes)
        table.add_row("steps learnt from", *(str(part.num_samples) for part in ranges))
        console.print(table)


def _coefficient(part: RangeModel, index: int, unit: str, factor: float) -> str:
    return f"{part.coefficients[index] * factor:.3f} {unit}" if part.is_trusted else "not yet known"


def _margin(part: RangeModel, spread: Spread) -> str:
    return f"up to {spread.margin:+.1%}" if part.is_trusted else "not yet known"


def _times(stage: StageModel, load: StepLoad) -> str:
    return f"{1e3 * stage.seconds(load):.2f} ({1e3 * stage.planned_seconds(load):.2f})"


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None, header_style="")
    for name in others:
        table.add_column(name, justify="right")
    return table
