"""Commands in a root of their own, as `make image-check` runs them. Needs root.

The root is an empty one with this machine's /usr mounted into it.
"""

import os
import signal
import stat
from pathlib import Path

import pytest
from deploy.image_check.build import Builder
from deploy.image_check.container import Container, ContainerEnded
from deploy.image_check.dockerfile import DockerfileError, read_instructions
from deploy.image_check.machine import Machine

USR = (Path("/usr"), Path("/usr"))
ENV = {"PATH": "/usr/bin", "GREETING": "two words"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "base-bookworm"
    for name in ("proc", "sys", "dev/shm", "tmp", "volume"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    os.mknod(root / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    return root


def test_a_command_has_its_own_world(root: Path, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o777)
    container = Container(
        root=root,
        env=ENV,
        user="10001:10002",
        workdir="/tmp",
        binds=(USR, (volume, Path("/volume"))),
        tmpfs=("/tmp",),
        is_read_only=True,
        network="none",
    )
    # A shell as process 1 would have no handler for SIGTERM, and ignore it.
    running = container.start(
        ["sh", "-c", "trap 'exit 7' TERM; echo x > /volume/up; sleep 99 & wait"]
    )
    try:
        while not (volume / "up").exists():
            assert running.process.poll() is None
        asked = running.run(["sh", "-c", 'id -u; id -g; pwd; echo "$GREETING"; env'])
        assert asked.stdout.splitlines()[:4] == ["10001", "10002", "/tmp", "two words"]
        assert "HOME" not in asked.stdout
        assert running.run(["sh", "-c", "echo x > /tmp/a"]).returncode == 0
        refused = running.run(["touch", "/written"], user="0:0")
        assert "Read-only file system" in refused.stderr
        devices = running.run(["cat", "/proc/net/dev"]).stdout.splitlines()[2:]
        assert [line.split(":")[0].strip() for line in devices] == ["lo"]
        running.signal(signal.SIGTERM)
        assert running.process.wait(30) == 7
    finally:
        running.kill()


def test_a_command_that_cannot_start(root: Path) -> None:
    running = Container(root=root, env=ENV, binds=(USR,)).start(["no-such-command"])
    assert running.process.wait(30) == 127
    with pytest.raises(ContainerEnded, match="status 127"):
        running.run(["true"])
    running.kill()


def test_run_sees_secrets_and_leaves_none(root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "pip.conf"
    secret.write_text("hidden")
    machine = Machine(
        apt_mirror="", apt_options="", secrets={"pip.conf": secret}, mounts=(USR,), proxies={}
    )
    text = """
        FROM debian:bookworm
        ARG NAME=argument
        ENV OTHER=variable
        WORKDIR /build
        RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \\
            cat /etc/pip.conf > seen && echo "$NAME $OTHER" > values
        USER 10001:10001
        RUN id -u > /build/nobody || exit 3
    """
    steps = read_instructions(text)
    with pytest.raises(DockerfileError, match="line 9, RUN: ended with status 3"):
        Builder(tmp_path, tmp_path, {}, machine, lambda _: None).build(steps)
    built = tmp_path / "stage-2"
    assert (built / "build/seen").read_text() == "hidden"
    assert (built / "build/values").read_text() == "argument variable\n"
    assert not (built / "etc/pip.conf").exists()
