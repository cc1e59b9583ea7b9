"""`chat`, `complete` and `bench`: options and errors; what they do is imported when one runs.

They are sub-commands of `shardline`, and of `shardline-client` where the client is installed alone.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardline_client.bench.classes import parse_class, parse_lengths

if TYPE_CHECKING:
    from shardline_client.bench.options import BenchOptions
    from shardline_client.settings import ClientOptions

Decorator = Callable[[Any], Any]

_PATH = click.Path(dir_okay=False, path_type=Path)
_URL = "URL is http://HOST:PORT or grpc://HOST:PORT; https:// and grpcs:// for TLS."
_CONNECTION: tuple[Decorator, ...] = (
    click.argument("url"),
    click.option("--model", help="[default: the server's first model]"),
    click.option("--api-key", envvar="SHARDLINE_API_KEY", show_envvar=True),
    click.option("--timeout", "timeout_s", type=float, help="seconds, to the end; 600 if not said"),
    click.option("--ca-file", type=_PATH, help="PEM authorities to trust instead of the system's"),
    click.option("--cert-file", type=_PATH, help="PEM certificate to show"),
    click.option("--key-file", type=_PATH, help="its private key"),
)
_SAMPLING: tuple[Decorator, ...] = (
    click.option("--max-tokens", type=int),
    click.option("--temperature", type=float, help="0 is greedy"),
    click.option("--top-p", type=float),
    click.option("--top-k", type=int),
    click.option("--min-p", type=float),
    click.option("--seed", type=int),
    click.option("--stop", multiple=True, help="text that ends the answer; may be repeated"),
    click.option("--presence-penalty", type=float),
    click.option("--frequency-penalty", type=float),
    click.option("--repetition-penalty", type=float),
)


_BUDGET: tuple[Decorator, ...] = (
    click.option("--ttft-ms", type=float, help="latency budget: arrival to first token"),
    click.option("--tpot-ms", type=float, help="mean time of each later token"),
    click.option("--deadline-ms", type=float, help="arrival to last token"),
    click.option("--priority", type=click.Choice(["interactive", "standard", "batch"])),
    click.option("--on-miss", type=click.Choice(["reject", "degrade"])),
)


class _Parsed(click.ParamType[Any]):
    """An option whose text a function reads, which raises ValueError."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            return self._read(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error))


def _parse_rates(text: str) -> tuple[float, ...]:
    rates = tuple(float(rate) for rate in text.split(","))
    if not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"{text!r}: a rate is above 0.")
    return rates


_LENGTHS = _Parsed("N|LOW:HIGH", parse_lengths)
_POSITIVE = click.FloatRange(0, min_open=True)


def with_options(decorators: tuple[Decorator, ...]) -> Decorator:
    """Several options at once, in their order."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Talk to a model server, and measure it."""


@main.command(epilog=_URL)
@with_options(_CONNECTION)
@click.option("--system", help="the system prompt")
@with_options(_SAMPLING)
@with_options(_BUDGET)
def chat(url: str, system: str | None, **values: Any) -> None:
    """Talk to the model at URL. Ctrl-C stops an answer, Ctrl-D or /exit ends."""
    from shardline_client.chat import Conversation, make_view

    with _one_line_errors():
        from shardline_client.connect import connect

        with connect(url, **_connection(values)) as client:
            Conversation(client, make_view(), system=system, sampling=_sampling(values)).run()


@main.command(epilog=_URL)
@with_options(_CONNECTION)
@click.argument("text", required=False)
@with_options(_SAMPLING)
@with_options(_BUDGET)
def complete(url: str, text: str | None, **values: Any) -> None:
    """Continue TEXT (or what stdin holds, as it is) and write nothing but the continuation."""
    prompt = sys.stdin.read() if text is None or text == "-" else text
    with _one_line_errors():
        from shardline_client.connect import connect

        with (
            connect(url, **_connection(values)) as client,
            client.stream_complete(prompt, **_sampling(values)) as stream,
        ):
            for piece in stream:
                print(piece.text, end="", flush=True)
        if sys.stdout.isatty():
            print()
        if (reason := stream.completion.finish_reason) not in ("stop", "length"):
            raise click.ClickException(f"The answer is not complete; it ended with {reason!r}.")


# What is loaded, and with what; whoever simulates a load takes them too.
LOAD: tuple[Decorator, ...] = (
    click.option(
        "--rate",
        "rates",
        type=_Parsed("R[,R…]", _parse_rates),
        default=(),
        help="new requests per second, however many are under way; several are run in turn",
    ),
    click.option(
        "--cv", type=_POSITIVE, help="coefficient of variation of the gaps  [default: 1, Poisson]"
    ),
    click.option("--burstiness", type=_POSITIVE, help="the same as the gamma shape, 1 / CV²"),
    click.option("--trace", type=_PATH, help="arrivals and lengths from an Azure LLM trace (CSV)"),
    click.option(
        "--time-scale", type=_POSITIVE, help="stretch the trace's times; --rate does it too"
    ),
    click.option("--length-scale", type=_POSITIVE, default=1.0, help="stretch the trace's lengths"),
    click.option(
        "--budget",
        "budgets",
        type=_Parsed("CLASS:…", parse_class),
        multiple=True,
        help="judge requests, as interactive:ttft=1500,tpot=100,share=0.7 (ms); may be repeated. "
        "Also deadline, on_miss, and a class's own prompt and output lengths",
    ),
    click.option(
        "--num-requests", type=click.IntRange(1), help="[default: 100 without --duration]"
    ),
    click.option(
        "--duration", "duration_s", type=_POSITIVE, help="begin no request after so many seconds"
    ),
    click.option(
        "--warm-up",
        "warm_up_s",
        type=click.FloatRange(0),
        default=0.0,
        help="do not count requests that arrive in the first so many seconds",
    ),
    click.option(
        "--cool-down",
        "cool_down_s",
        type=click.FloatRange(0),
        default=0.0,
        help="nor those in the last so many seconds",
    ),
    click.option("--prompt-tokens", type=_LENGTHS, default="256", show_default=True),
    click.option("--output-tokens", type=_LENGTHS, default="128", show_default=True),
    click.option("--seed", type=int, help="of prompts, lengths and arrivals  [default: a new one]"),
    click.option("--json", "json_file", type=_PATH, help="write all figures and requests there"),
    click.option("--png", "png_file", type=_PATH, help="write a chart there (needs matplotlib)"),
)


@main.command(epilog=_URL)
@with_options(_CONNECTION)
@click.option("--concurrency", type=click.IntRange(1), help="so many at a time  [default: 1]")
@with_options(LOAD)
@click.option(
    "--send-budget/--no-send-budget",
    default=None,
    help="tell the server its budgets  [default: on if the server is Shardline]",
)
@click.option(
    "--num-seeds", type=click.IntRange(1), default=1, help="run each rate with so many seeds"
)
@click.option(
    "--find-capacity",
    is_flag=True,
    help="find the largest rates with 99 % and 90 % of requests in time, beginning at --rate",
)
@click.option("--precision", type=_POSITIVE, default=0.1, help="of that rate", show_default=True)
@click.option("--temperature", type=float, default=0.0)
@click.option("--chat", "is_chat", is_flag=True, help="send chat messages instead of prompts")
@click.option(
    "--ignore-eos/--no-ignore-eos",
    default=None,
    help="not to end before --output-tokens  [default: on if the server is Shardline]",
)
def bench(url: str, **values: Any) -> None:
    """Load the server at URL and tell how fast it answered.

    Any server with OpenAI's /v1/completions (or, with --chat, /v1/chat/completions) will do.
    """
    from shardline_client.bench.command import run

    with _one_line_errors():
        connection = _connection(values)
        files = values.pop("json_file"), values.pop("png_file")
        status = run(url, connection, bench_options(values), *files)
    click.get_current_context().exit(status)


def bench_options(values: dict[str, Any]) -> "BenchOptions":
    """What was said of a load. Raises ValueError where options exclude each other."""
    from shardline_client.bench.options import BenchOptions

    given = {name: value for name, value in values.items() if value is not None}
    cv, burstiness = given.pop("cv", None), given.pop("burstiness", None)
    if cv is not None and burstiness is not None:
        raise ValueError("--cv and --burstiness say the same; give one of them.")
    return BenchOptions(cv=cv or (burstiness or 1.0) ** -0.5, **given)


def _connection(values: dict[str, Any]) -> "ClientOptions":
    """Takes the options of a client out of all values."""
    from shardline_client.settings import Tls

    files = {name: values.pop(name) for name in ("ca_file", "cert_file", "key_file")}
    options: ClientOptions = {
        "model": values.pop("model"),
        "api_key": values.pop("api_key"),
        "tls": Tls(**files) if any(files.values()) else None,
    }
    if (timeout_s := values.pop("timeout_s")) is not None:
        options["timeout_s"] = timeout_s
    return options


def _sampling(values: dict[str, Any]) -> dict[str, Any]:
    """What was said, with the latency budget under one name."""
    said = {name: value for name, value in values.items() if value not in (None, ())}
    names = ("ttft_ms", "tpot_ms", "deadline_ms", "priority", "on_miss")
    budget = {name: said.pop(name) for name in names if name in said}
    return said | ({"latency_budget": budget} if budget else {})


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What went wrong in one line on stderr: status 1, or 2 where the command line is wrong."""
    from shardline_client.errors import ClientError

    try:
        yield
    except ClientError as error:
        raise click.ClickException(" ".join(error.message.split())) from error
    except BrokenPipeError:
        raise  # click knows that the reader has had enough
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error
