"""`shardline bench`: find out what the server is, load it, report."""

import asyncio
import importlib.util
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shardline_client.async_client import AsyncClient
from shardline_client.bench.load import Load, plan
from shardline_client.bench.options import BenchOptions
from shardline_client.bench.prompts import TokenPrompts, make_prompts
from shardline_client.bench.records import Outcome, Record, summarize
from shardline_client.bench.report import print_report, write_json
from shardline_client.connect import OURS, adapted, choose_model
from shardline_client.errors import ClientError
from shardline_client.results import Model
from shardline_client.settings import ClientOptions, Retry


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What was measured, and how."""

    server: dict[str, Any]
    records: list[Record]


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
    done = asyncio.run(_measure(url, connection | {"retry": Retry(max_attempts=1)}, options))
    summary = summarize(done.records)
    print_report(Console(), summary, done.records)
    if json_file is not None:
        write_json(json_file, server=done.server, summary=summary, records=done.records)
    if png_file is not None:
        from shardline_client.bench.plot import write_png

        write_png(png_file, done.records, f"{done.server['model']} at {url}")
    return 0 if summary.num_ok else 1


async def _measure(url: str, connection: ClientOptions, options: BenchOptions) -> Run:
    model = await _find_model(url, connection)
    is_ours = model.owned_by == OURS
    ignore_eos = is_ours if options.ignore_eos is None else options.ignore_eos
    async with AsyncClient(url, **connection | adapted(model)) as client:
        prompts = await make_prompts(client, is_chat=options.is_chat)
        load = Load(client, options, ignore_eos=ignore_eos)
        warm_up = random.Random(f"warm-up {options.seed}")  # no prefix that the run will use
        await load.warm_up(next(plan(options, prompts, warm_up)))
        requests = plan(options, prompts, random.Random(options.seed))
        with _Progress(options) as progress:
            records = await load.run(requests, progress.observe)
    server = {
        "url": url,
        "model": model.name,
        "owned_by": model.owned_by,
        "prompts": "token ids" if isinstance(prompts, TokenPrompts) else "text",
        "options": asdict(options) | {"ignore_eos": ignore_eos},
    }
    return Run(server=server, records=records)


async def _find_model(url: str, connection: ClientOptions) -> Model:
    async with AsyncClient(url, **connection) as client:
        return choose_model(await client.models(), connection.get("model"))


class _Progress:
    """A bar on stderr, where that is a terminal."""

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
        self._num_bad = 0

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def observe(self, record: Record) -> None:
        """One more."""
        self._num_bad += record.outcome is not Outcome.OK
        text = "requests" if not self._num_bad else f"requests, {self._num_bad} not ok"
        self._bar.update(self._task, advance=1, description=text)
