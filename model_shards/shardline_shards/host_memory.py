"""How much memory a process may still take: what the host has, or what its container leaves."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class _Controller:
    """Where one version of Linux control groups keeps its numbers."""

    mount: str
    limit: str
    usage: str
    reclaimable: str


_V1 = _Controller(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)
_V2 = _Controller("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def available_memory(system: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping, and without being killed for it.

    A container sees all memory of its host, and is killed at the limit of its control group. Pages
    of files that have not been used for long do not count: they make room.
    """
    return min([psutil.virtual_memory().available, *_left_by_limits(system)])


def _left_by_limits(system: Path) -> Iterator[int]:
    """Of each limit over this process: its own group's, and those of the groups above."""
    membership = system / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        controller = _V1 if controllers else _V2
        mount = system / controller.mount
        own = mount / path.strip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(mount) and (group / controller.limit).is_file():
                yield from _left_in(group, controller)


def _left_in(group: Path, controller: _Controller) -> Iterator[int]:
    limit = (group / controller.limit).read_text().strip()
    if limit == "max":
        return
    usage = int((group / controller.usage).read_text())
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    yield max(0, int(limit) - usage + int(statistics[controller.reclaimable]))
