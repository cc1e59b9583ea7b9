"""The build context: which files `COPY` may see, by the rules of .dockerignore."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class _Rule:
    """One line; `ignores` is False where it begins with an exclamation mark."""

    ignores: bool
    text: str
    pattern: re.Pattern[str]

    def may_let_through_below(self, folder: str) -> bool:
        return not self.ignores and (self.text.startswith((f"{folder}/", "*")))


def context_files(context: Path) -> Iterator[Path]:
    """Files below `context` that .dockerignore lets through, as paths relative to it."""
    rules = list(_rules((context / ".dockerignore").read_text()))
    folders = [context]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            name = path.relative_to(context).as_posix()
            is_ignored = _is_ignored(name, rules)
            if path.is_dir() and not path.is_symlink():
                if not is_ignored or any(rule.may_let_through_below(name) for rule in rules):
                    folders.append(path)
            elif not is_ignored:
                yield Path(name)


def _rules(text: str) -> Iterator[_Rule]:
    for line in text.splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            glob = pattern.removeprefix("!").strip("/")
            yield _Rule(not pattern.startswith("!"), glob, _compile(glob))


def _compile(glob: str) -> re.Pattern[str]:
    """`*` stays within one folder, `**/` is any number of them; a folder matches what it holds."""
    pieces = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*|\?)", glob)
    return re.compile("".join(pieces.get(part) or re.escape(part) for part in parts) + "(?:/.*)?")


def _is_ignored(path: str, rules: list[_Rule]) -> bool:
    """The last rule that matches decides."""
    verdicts = [rule.ignores for rule in rules if rule.pattern.fullmatch(path)]
    return bool(verdicts) and verdicts[-1]
