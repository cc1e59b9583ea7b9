"""What the declarations of settings are made of."""

from dataclasses import dataclass
from typing import Annotated

import yaml
from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode


@dataclass(frozen=True, slots=True)
class Flag:
    """How a setting looks on the command line: its help group, placeholder and further names."""

    group: str
    metavar: str = ""
    aliases: tuple[str, ...] = ()


def _split_commas(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


def _parse_yaml(value: object) -> object:
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ValueError("this is not YAML") from error


CommaSeparated = (NoDecode, BeforeValidator(_split_commas))
WrittenAsYaml = (NoDecode, BeforeValidator(_parse_yaml))
Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
