"""Reads a Dockerfile: the instructions that ours uses, and an error for every other.

Escapes, here-documents, ONBUILD, ADD and the like are not understood, and refused.
"""

import json
import re
import shlex
from dataclasses import dataclass
from string import Template

# Each instruction that is known, with the options that it may carry.
KNOWN: dict[str, tuple[str, ...]] = {
    "ARG": (),
    "CMD": (),
    "COPY": ("from",),
    "ENTRYPOINT": (),
    "ENV": (),
    "EXPOSE": (),
    "FROM": (),
    "HEALTHCHECK": ("interval", "timeout", "start-period"),
    "RUN": ("mount",),
    "USER": (),
    "VOLUME": (),
    "WORKDIR": (),
}


class DockerfileError(Exception):
    """The Dockerfile holds what is not understood here; the message names the line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One instruction; `options` are its `--name=value` words, `text` is what follows them."""

    line: int
    name: str
    options: tuple[tuple[str, str], ...]
    text: str

    @property
    def words(self) -> list[str]:
        """The text cut at blanks, quotes respected."""
        return shlex.split(self.text)

    @property
    def command(self) -> list[str]:
        """The text as a JSON list of words. Raises DockerfileError for a shell's form."""
        try:
            words = json.loads(self.text)
        except ValueError:
            words = None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise self.error('write the command as a list, such as ["serve", "demo"]')
        return words

    def error(self, problem: str) -> DockerfileError:
        """An error about this instruction, to be raised."""
        return DockerfileError(f"Dockerfile, line {self.line}, {self.name}: {problem}")


def read_instructions(text: str) -> list[Instruction]:
    """All instructions in order. Raises DockerfileError for one that is not known."""
    return [_instruction(number, line) for number, line in _logical_lines(text)]


def expand(instruction: Instruction, text: str, values: dict[str, str]) -> str:
    """`text` with $NAME and ${NAME} filled in. Raises DockerfileError for a name without value."""
    try:
        return Template(text).substitute(values)
    except (KeyError, ValueError) as error:
        raise instruction.error(f"{text}: {error} has no value") from error


def _logical_lines(text: str) -> list[tuple[int, str]]:
    """Each instruction in one string, with the number of its first line; without comments."""
    found: list[tuple[int, str]] = []
    parts: list[str] = []
    first = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#") or (not line.strip() and not parts):
            continue
        first = first if parts else number
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            found.append((first, "".join(parts)))
            parts = []
    if parts:
        raise DockerfileError(f"Dockerfile, line {first}: the last line ends in a backslash")
    return found


def _instruction(number: int, line: str) -> Instruction:
    name, _, rest = line.strip().partition(" ")
    options, text = _split_options(rest)
    instruction = Instruction(line=number, name=name, options=options, text=text)
    if name not in KNOWN:
        raise instruction.error("not known here; extend deploy/image_check if the image needs it")
    if "<<" in text:
        raise instruction.error("here-documents are not known here")
    for option, _ in options:
        if option not in KNOWN[name]:
            raise instruction.error(f"--{option} is not known here")
    return instruction


def _split_options(rest: str) -> tuple[tuple[tuple[str, str], ...], str]:
    options = []
    rest = rest.strip()
    while match := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
        options.append((match[1], match[2]))
        rest = rest[match.end() :]
    return tuple(options), rest
