"""Turns the fields of a settings model into command line options; values stay text for pydantic.

Nothing is declared twice: names, groups, defaults and help come from the model's fields.
"""

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from shardline_server.flags import Flag
from shardline_server.settings import GROUPS, ServeSettings


class GroupedOption(click.Option):
    """An option that stands under a heading of its own in the help."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help lists its options group by group; its docstring describes arguments."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group, in the order of GROUPS, and --help last."""
        sections: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for option in self.get_params(ctx):
            group = option.group if isinstance(option, GroupedOption) else "Help"
            record = option.get_help_record(ctx)
            if record and not isinstance(option, click.Argument):
                sections.setdefault(group, []).append(record)
        for group, records in sections.items():
            with formatter.section(group):
                formatter.write_dl(records)


def settings_parameters() -> list[click.Parameter]:
    """The positional MODEL, and one option for each other setting."""
    return [_parameter(name, field) for name, field in ServeSettings.model_fields.items()]


def given_settings(values: dict[str, Any]) -> dict[str, Any]:
    """What the command line really named, ready for `load_settings`."""
    return {name: value for name, value in values.items() if value is not None and value != ()}


def _parameter(name: str, field: FieldInfo) -> click.Parameter:
    if name == "model":
        return click.Argument([name], required=False)
    flag = next(item for item in field.metadata if isinstance(item, Flag))
    option = f"--{name.replace('_', '-')}"
    is_bool = field.annotation in (bool, bool | None)
    return GroupedOption(
        [f"{option}/--no-{option[2:]}" if is_bool else option, *flag.aliases, name],
        group=flag.group,
        type=click.BOOL if is_bool else click.STRING,
        default=None,
        multiple=get_origin(field.annotation) is tuple,
        metavar=None if is_bool else flag.metavar or "|".join(_choices(field.annotation)),
        help=_help(field),
    )


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) in (Union, UnionType):
        return _choices(get_args(annotation)[0])
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _help(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is None or default == ():
        return field.description or ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    if isinstance(default, ByteSize):
        default = default.human_readable(separator="")
    return f"{field.description} [default: {default}]"
