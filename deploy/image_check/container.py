"""Runs a command in a root as a container engine would: own processes, own mounts, given user."""

import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

# What an engine mounts into each container. Devices lie in debootstrap's root already.
_FIXED_MOUNTS = """
mount --bind {root} {root}
mount -t proc -o nosuid,nodev,noexec proc {root}/proc
mount --bind /sys {root}/sys
mount -o remount,ro,bind {root}/sys
mount -t tmpfs -o nosuid,nodev,noexec,size=1g shm {root}/dev/shm
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """How a command runs: `user` is UID:GID, `binds` are (path here, path inside).

    `network` is the machine's own, a new one with loopback alone, or that of another container.
    """

    root: Path
    env: dict[str, str]
    user: str = "0:0"
    workdir: str = "/"
    binds: tuple[tuple[Path, Path], ...] = ()
    tmpfs: tuple[str, ...] = ()
    is_read_only: bool = False
    network: "Literal['host', 'none'] | Running" = "host"

    def start(self, command: Sequence[str]) -> "Running":
        """Start `command` as process 1 of namespaces of its own."""
        self._make_mount_points()
        script = f"set -e{self._mounts()}exec {shlex.join(self._inside(command))}"
        isolate = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--ipc"]
        network = self.network
        if network == "none":
            isolate.append("--net")
        elif network != "host":
            isolate[:0] = ["nsenter", f"--net=/proc/{network.first_pid}/ns/net"]
        return Running(self, subprocess.Popen([*isolate, "sh", "-c", script]))

    def _inside(self, command: Sequence[str]) -> list[str]:
        variables = [f"{name}={value}" for name, value in self.env.items()]
        chroot = ["chroot", f"--userspec={self.user}", "--groups=", str(self.root)]
        return [*chroot, "env", "-i", f"--chdir={self.workdir}", *variables, *command]

    def _mounts(self) -> str:
        root = shlex.quote(str(self.root))
        lines = [_FIXED_MOUNTS.format(root=root)]
        if self.network == "none":
            lines.append("ip link set lo up\n")
        for path, target in self.binds:
            lines.append(f"mount --bind {shlex.quote(str(path))} {root}{target}\n")
        for folder in self.tmpfs:
            options = "nosuid,nodev,noexec,mode=1777"
            lines.append(f"mount -t tmpfs -o {options} tmpfs {root}{folder}\n")
        if self.is_read_only:
            lines.append(f"mount -o remount,ro,bind {root}\n")
        return "".join(lines)

    def _make_mount_points(self) -> None:
        for path, target in self.binds:
            inside = self.root / target.relative_to("/")
            if path.is_dir():
                inside.mkdir(parents=True, exist_ok=True)
            elif not inside.exists():
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.touch()


class ContainerEnded(Exception):
    """Nothing runs in the container any more."""


@dataclass(slots=True)
class Running:
    """A container that runs, or has run."""

    container: Container
    process: subprocess.Popen[bytes]
    _first_pid: int | None = field(default=None, init=False)

    @property
    def first_pid(self) -> int:
        """The process, as seen from here, that is number 1 inside. Raises ContainerEnded."""
        if self._first_pid is None:
            own = self.process.pid
            children: list[str] = []
            while not children:  # unshare is about to fork
                if (status := self.process.poll()) is not None:
                    raise ContainerEnded(f"the container ended with status {status}")
                children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
            self._first_pid = int(children[0])
        return self._first_pid

    def run(
        self, command: Sequence[str], user: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one more command in the same namespaces, as `docker exec` does."""
        own = self.container if user is None else replace(self.container, user=user)
        enter = ["nsenter", "--target", str(self.first_pid), "--mount", "--pid", "--ipc", "--net"]
        return subprocess.run(
            [*enter, *own._inside(command)], capture_output=True, text=True, check=False
        )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to process 1, as `docker stop` does."""
        os.kill(self.first_pid, number)

    def kill(self) -> None:
        """End whatever still runs."""
        if self.process.poll() is None:
            os.kill(self.first_pid, signal.SIGKILL)
            self.process.wait()
