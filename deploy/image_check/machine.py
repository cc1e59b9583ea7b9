"""How this machine reaches its package indexes, handed to the steps while they run.

What Docker's users pass with `--secret id=pip.conf,src=…` and proxy variables is read here from the
machine's own pip and apt. It is mounted for a step and leaves nothing in the image.
"""

import ast
import os
import re
import subprocess
import sys
from configparser import RawConfigParser
from dataclasses import dataclass
from pathlib import Path

DEBIAN_MIRROR = "http://deb.debian.org/debian"
MOUNTED_AT = Path("/run/machine")
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_APT_OPTIONS = re.compile(r"Acquire::(https?::Proxy|Check-Valid-Until|Check-Date|Retries)\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """`mounts` are (path here, path in the root); `secrets` are files by their id."""

    apt_mirror: str
    apt_options: str
    secrets: dict[str, Path]
    mounts: tuple[tuple[Path, Path], ...]
    proxies: dict[str, str]


def read_machine(suite: str, folder: Path) -> Machine:
    """This machine's ways; the pip configuration made of them is written to `folder`."""
    mounts: dict[Path, Path] = {Path("/etc/resolv.conf"): Path("/etc/resolv.conf")}
    configuration = RawConfigParser()
    for key, value in _pip_settings():
        section, _, name = key.partition(".")
        section = "global" if section.startswith(":env:") else section
        if not configuration.has_section(section):
            configuration.add_section(section)
        words = [_reachable(word, mounts) for word in value.split()]
        configuration.set(section, name.removeprefix("."), " ".join(words))
    pip_conf = folder / "pip.conf"
    with pip_conf.open("w") as file:
        configuration.write(file)
    return Machine(
        apt_mirror=_apt_mirror(suite),
        apt_options=_apt_options(),
        secrets={"pip.conf": pip_conf},
        mounts=tuple(mounts.items()),
        proxies={name: os.environ[name] for name in _PROXIES if name in os.environ},
    )


def _pip_settings() -> list[tuple[str, str]]:
    """Files first, PIP_* variables last: they win."""
    lines = _output(sys.executable, "-m", "pip", "config", "list").splitlines()
    pairs = [line.partition("=")[::2] for line in lines]
    return sorted(
        ((key, str(ast.literal_eval(value))) for key, value in pairs),
        key=lambda pair: pair[0].startswith(":env:"),
    )


def _reachable(word: str, mounts: dict[Path, Path]) -> str:
    """A file or folder of this machine, as its path in the root, where it will be mounted."""
    is_index = word.startswith("file://")
    path = Path(word.removeprefix("file://"))
    if not path.is_absolute() or not path.exists():
        return word
    mounted = path.parent if is_index else path  # pages of an index link to folders beside it
    mounts[mounted] = MOUNTED_AT / mounted.relative_to("/")
    return f"{'file://' if is_index else ''}{MOUNTED_AT / path.relative_to('/')}"


def _apt_mirror(suite: str) -> str:
    template = "$(SITE) $(CODENAME) $(COMPONENT)"
    targets = _output("apt-get", "indextargets", "--format", template, "Created-By: Packages")
    for line in targets.splitlines():
        site, *rest = line.split(" ")
        if rest == [suite, "main"]:
            return site
    return DEBIAN_MIRROR


def _apt_options() -> str:
    lines = _output("apt-config", "dump").splitlines()
    return "".join(f"{line}\n" for line in lines if _APT_OPTIONS.match(line))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
