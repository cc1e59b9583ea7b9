"""Free memory where a container's limit is less than what the host has."""

from pathlib import Path

import psutil
import pytest

from shardline_shards.host_memory import available_memory

MIB = 2**20
V1, V2 = Path("sys/fs/cgroup/memory"), Path("sys/fs/cgroup")


def write_group(folder: Path, names: tuple[str, str], limit: str, usage: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, str(usage)), strict=True):
        (folder / name).write_text(f"{text}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{stat} {5 * MIB}\n")


def write_v2(folder: Path, limit: str, usage: int) -> None:
    write_group(folder, ("memory.max", "memory.current"), limit, usage, "inactive_file")


@pytest.fixture
def system(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def test_no_control_groups(tmp_path: Path) -> None:
    assert 0 < available_memory(tmp_path) <= psutil.virtual_memory().total


def test_the_narrowest_group_above_counts(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("1:cpu,cpuacct:/a\n0::/pod/server\n")
    write_v2(system / V2 / "pod/server", "max", 20 * MIB)
    write_v2(system / V2 / "pod", str(64 * MIB), 30 * MIB)
    assert available_memory(system) == (64 - 30 + 5) * MIB


def test_a_full_group_leaves_nothing(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("0::/\n")
    write_v2(system / V2, str(64 * MIB), 80 * MIB)
    assert available_memory(system) == 0


def test_the_first_version_from_inside_a_container(system: Path) -> None:
    """The path is the host's, and the container sees its own group where the root should be."""
    (system / "proc/self/cgroup").write_text("4:memory:/docker/1a2b\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write_group(system / V1, names, str(64 * MIB), 30 * MIB, "total_inactive_file")
    assert available_memory(system) == 39 * MIB
