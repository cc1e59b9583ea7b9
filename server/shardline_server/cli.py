"""The `shardline` command. Heavy libraries are imported by the sub-command that needs them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from shardline_client import command_line as client_commands
from shardline_server.errors import ConfigError
from shardline_server.options import (
    GroupedCommand,
    GroupedOption,
    given_settings,
    settings_parameters,
)
from shardline_server.settings import load_settings
from shardline_shards.errors import ShardError

_SERVE_HELP = """Serve MODEL over HTTP and gRPC until Ctrl-C.

MODEL is a folder of safetensors, a hub id, a .gguf file, or `demo`.

\b
  shardline serve demo --pp 2
  shardline serve ./my-model --tp 2 --pp 2 --port 8080

Every setting can also come from a variable, as SHARDLINE_MAX_MODEL_LEN=4096, or from a YAML file
named by --config, as `max_model_len: 4096`. The command line wins, then variables, then the file.
"""

_PLAN_HELP = """Say what `serve` would do with MODEL and these settings, without serving.

The split, the memory of each stage, and what steps take, as earlier starts on this host have
measured it; without any, workers load the model as `serve` would, and it is measured now. With
--nodes: where workers and layers would lie; no other node is needed for that.

\b
  shardline plan demo --pp 2
  shardline plan ./my-model --tp 2 --pp 2 --explain
  shardline plan ./my-model --tp 4 --pp 3 --nodes 2 --node-gpus 8,4 --node-memory 80GiB,24GiB
"""

_FILE = click.Path(dir_okay=False, path_type=Path)


class _Refusal(click.ClickException):
    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Serve one large language model that is split over many devices."""


def _serve(**values: Any) -> None:
    with _one_line_errors():
        settings = load_settings(given_settings(values))
        _start_logging(settings.log_level)
        from shardline_server.launch import serve

        status = serve(settings)
    click.get_current_context().exit(status)


main.add_command(
    GroupedCommand(
        "serve",
        callback=_serve,
        params=settings_parameters(),
        help=_SERVE_HELP,
        short_help="Serve a model over HTTP and gRPC.",
    )
)


def _plan(explain: bool, node_memory: str | None, **values: Any) -> None:
    with _one_line_errors():
        settings = load_settings(given_settings(values))
        _start_logging(settings.log_level)
        from shardline_server.plan.command import print_plan

        print_plan(settings, explain=explain, node_memory=node_memory)


main.add_command(
    GroupedCommand(
        "plan",
        callback=_plan,
        params=[
            *settings_parameters(),
            GroupedOption(
                ["--explain"],
                is_flag=True,
                group="Planning",
                help="also the coefficients of the cost model, with their units",
            ),
            GroupedOption(
                ["--node-memory"],
                metavar="SIZE,SIZE,…",
                group="Planning",
                help="with --nodes: what is free on each node, the head's first, as 80GiB,24GiB, "
                "on a GPU or, on CPUs, in all [default: as much as here]",
            ),
        ],
        help=_PLAN_HELP,
        short_help="Say what serve would do, without serving.",
    )
)


for _command in (client_commands.chat, client_commands.complete, client_commands.bench):
    main.add_command(_command)


@main.command()
@click.argument("model")
@click.option("--cache", type=click.Path(path_type=Path), help="where converted models are kept")
def pull(model: str, cache: Path | None) -> None:
    """Fetch or convert MODEL as `serve` would, and print its folder."""
    _start_logging("info")
    with _one_line_errors():
        from shardline_shards.sources import resolve_model

        click.echo(resolve_model(model, cache_dir=cache))


@main.command()
@click.option("--join", required=True, metavar="HOST:PORT", help="where the head waits")
@click.option("--secret", envvar="SHARDLINE_SECRET", help="what the head has printed")
@click.option("--model", help="this node's copy of the model [default: what the head names]")
@click.option("--address", help="this node's own address [default: the one that reaches the head]")
@click.option("--iface", metavar="NAME", help="the network interface whose address that is")
@click.option("--cache", type=click.Path(path_type=Path), help="where converted models are kept")
@click.option("--join-timeout", default=300, show_default=True, help="seconds to wait for the head")
@click.option("--log-level", default="info", show_default=True)
def worker(log_level: str, join: str, secret: str | None, iface: str | None, **values: Any) -> None:
    """Take part, with this node, in what a head serves with --nodes."""
    _start_logging(log_level)
    with _one_line_errors():
        from shardline_server.node_agent import NodeSettings, run_node
        from shardline_server.node_plan import find_address
        from shardline_server.rendezvous import parse_board

        if not secret:
            raise ConfigError("no secret: set SHARDLINE_SECRET to what the head has printed")
        if iface and values["address"]:
            raise ConfigError(f"--iface {iface} and --address say the same thing; give one")
        if iface:
            values["address"] = find_address(iface)
        status = run_node(NodeSettings(board=parse_board(join), secret=secret, **values))
    click.get_current_context().exit(status)


@main.command()
@click.option("--stages", type=click.IntRange(1), help="of each replica [default: of the costs]")
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True)
@click.option("--costs", type=_FILE, help="what steps cost, as a server keeps it in its cache")
@click.option(
    "--cost",
    metavar="A,B,C,D,E",
    help="instead: of each stage, ms a step, a prompt token, a decode, a token of context of a "
    "decode, a prompt token times its context",
)
@click.option("--overhead-ms", type=click.FloatRange(0), help="of a step's way through the pipe")
@click.option("--noise", type=click.FloatRange(0), default=0.0, help="spread of step times")
@click.option(
    "--router",
    type=click.Choice(["earliest-finish", "fewest-requests"]),
    default="earliest-finish",
    show_default=True,
)
@click.option("--max-tokens", type=click.IntRange(1), help="hide output lengths behind this limit")
@click.option("--policy", type=click.Choice(["edf", "fcfs"]), default="edf", show_default=True)
@click.option("--kv-tokens", type=click.IntRange(1), default=131_072, show_default=True)
@click.option("--max-model-len", type=click.IntRange(1), default=8192, show_default=True)
@click.option("--max-num-seqs", type=click.IntRange(1), default=256, show_default=True)
@click.option("--max-num-batched-tokens", type=click.IntRange(1), default=2048, show_default=True)
@click.option("--max-in-flight", type=click.IntRange(1), help="steps  [default: one a stage]")
@click.option("--async-scheduling", is_flag=True, help="plan one step more than there are stages")
@click.option("--cache", type=click.Path(path_type=Path), help="where a server keeps what it knows")
@client_commands.with_options(client_commands.LOAD)
def simulate(**values: Any) -> None:
    """Serve a load by the real scheduler and admission, on pipes that exist as numbers alone.

    \b
      shardline simulate --stages 4 --replicas 100 --rate 50 --budget interactive:ttft=1500,tpot=100
      shardline simulate --trace azure.csv --time-scale 0.5
    """
    with _one_line_errors():
        from shardline_server.simulate.arguments import simulate_as_said

        simulate_as_said(values, client_commands.bench_options)


@main.command()
def version() -> None:
    """Print the versions of Shardline, torch and transformers."""
    for name in ("shardline", "torch", "transformers"):
        click.echo(f"{name} {metadata.version(name)}")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What the operator can mend ends in one line and exit status 2, not in a traceback."""
    try:
        yield
    except (ConfigError, ShardError) as error:
        raise _Refusal(" ".join(str(error).split())) from error


def _start_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s")
