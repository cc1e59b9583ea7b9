"""`shardline bench`: find out what the server is, load it, report."""

import asyncio
import importlib.util
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shardline_client.async_client import AsyncClient
from shardline_client.bench.arrivals import read_trace
from shardline_client.bench.load import Load, Observer
from shardline_client.bench.measure import Bench, Measurement
from shardline_client.bench.options import BenchOptions
from shardline_client.bench.prompts import TokenPrompts, make_prompts
from shardline_client.bench.records import Outcome, Record
from shardline_client.bench.report import print_report, write_json
from shardline_client.connect import OURS, adapted, choose_model
from shardline_client.errors import ClientError
from shardline_client.results import Model
from shardline_client.settings import ClientOptions, Retry


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What was measured, and how."""

    server: dict[str, Any]
    measurement: Measurement


def run(
    url: str,
    connection: ClientOptions,
    options: BenchOptions,
    json_file: Path | None,
    png_file: Path | None,
) -> int:
    """The exit status: 1 if no request ended well. Raises ClientError if there is no server."""
    if png_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise ClientError("--png needs matplotlib: pip install 'shardline[bench]'")
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        patient = connection | {"retry": Retry(max_attempts=1)}
        done = runner.run(_measure(url, patient, options))
    print_report(Console(), done.measurement)
    if json_file is not None:
        write_json(json_file, server=done.server, measurement=done.measurement)
    if png_file is not None:
        from shardline_client.bench.plot import write_png

        write_png(png_file, done.measurement, f"{done.server['model']} at {url}")
    return 0 if any(point.summary.num_ok for point in done.measurement.points) else 1


def _loop_factory() -> Any:
    """Less CPU for each token where uvloop is installed, as it is with a server of ours."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


async def _measure(url: str, connection: ClientOptions, options: BenchOptions) -> Measured:
    trace = None if options.trace is None else read_trace(options.trace)
    model = await _find_model(url, connection)
    is_ours = model.owned_by == OURS
    options = replace(
        options,
        ignore_eos=is_ours if options.ignore_eos is None else options.ignore_eos,
        send_budget=_sends_budgets(options, is_ours=is_ours),
    )
    async with AsyncClient(url, **connection | adapted(model)) as client:
        prompts = await make_prompts(client, is_chat=options.is_chat)
        with _Progress(options) as progress:
            load = Load(client, options)
            bench = Bench(load, options, prompts, trace, begin=progress.begin)
            measurement = await bench.measure()
    server = {
        "url": url,
        "model": model.name,
        "owned_by": model.owned_by,
        "prompts": "token ids" if isinstance(prompts, TokenPrompts) else "text",
        "options": asdict(options),
    }
    return Measured(server=server, measurement=measurement)


def _sends_budgets(options: BenchOptions, *, is_ours: bool) -> bool:
    wants = is_ours if options.send_budget is None else options.send_budget
    return wants and bool(options.budgets)


async def _find_model(url: str, connection: ClientOptions) -> Model:
    async with AsyncClient(url, **connection) as client:
        return choose_model(await client.models(), connection.get("model"))


class _Progress:
    """A bar on stderr, where that is a terminal; it begins anew with each run."""

    def __init__(self, options: BenchOptions) -> None:
        console = Console(stderr=True)
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("requests", total=options.max_requests)

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, what: str) -> Observer:
        """A new run; call the result with each record."""
        self._bar.reset(self._task, description=f"requests, {what}")
        num_bad = 0

        def observe(record: Record) -> None:
            nonlocal num_bad
            num_bad += record.outcome is not Outcome.OK
            text = f"requests, {what}" + (f", {num_bad} not ok" if num_bad else "")
            self._bar.update(self._task, advance=1, description=text)

        return observe
