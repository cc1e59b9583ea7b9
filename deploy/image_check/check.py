"""Starts the server in a built image, asks it through both doors, and sees it stop."""

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from deploy.image_check.build import Stage
from deploy.image_check.container import Container, Running

_DOORS = ("http://127.0.0.1:8000", "grpc://127.0.0.1:50051")
_PROMPT = "The capital of France is"
_LIMIT_S = 300.0
_STOPS_WITHIN_S = 30.0

# What deploy/compose.nodes.yaml makes of its variables where both nodes are one host.
HEAD = ("serve", "demo", "--nodes=2", "--pp=2", "--rendezvous=127.0.0.1:29500")
NODE = ("worker", "--join", "127.0.0.1:29500")

Report = Callable[[str], None]


class CheckFailed(Exception):
    """The image does not do what it should; the message says what."""


def check_image(image: Stage, folder: Path, report: Report) -> None:
    """Serve from the image on a read-only root, alone and as two nodes. Raises CheckFailed."""
    binds = tuple(_volumes(image, folder))
    container = Container(
        root=image.root,
        env=image.env,
        user=image.user,
        workdir=image.workdir,
        binds=binds,
        tmpfs=("/tmp",),
        is_read_only=True,
        network="none",
    )
    _check_alone(image, container, report)
    kernels = sorted((folder / "volumes/cache").rglob("kernels/*.so"))
    _require(bool(kernels), "no CPU kernel has been compiled")
    report(f"compiled in the volume: {kernels[0].relative_to(folder / 'volumes')}")
    _check_two_nodes(image, container, report)


def _check_alone(image: Stage, container: Container, report: Report) -> None:
    with _started(container, image.entrypoint, image.command) as server:
        took_s = _wait_healthy(server, image)
        report(f"healthy after {took_s:.0f} s, root read-only, no network but loopback")
        _check_isolation(server, image)
        _ask_both_doors(server, report)
        report(f"SIGTERM: status 0 after {_stop(server):.1f} s")


def _check_two_nodes(image: Stage, container: Container, report: Report) -> None:
    container = replace(container, env=image.env | {"SHARDLINE_SECRET": secrets.token_hex()})
    with (
        _started(container, image.entrypoint, HEAD) as head,
        _started(replace(container, network=head), image.entrypoint, NODE) as node,
    ):
        report(f"two nodes healthy after {_wait_healthy(head, image):.0f} s")
        _ask_both_doors(head, report)
        report(f"SIGTERM to the head: status 0 of both after {_stop(head, node):.1f} s")


@contextmanager
def _started(
    container: Container, entrypoint: Sequence[str], command: Sequence[str]
) -> Iterator[Running]:
    running = container.start([*entrypoint, *command])
    try:
        yield running
    finally:
        running.kill()


def _volumes(image: Stage, folder: Path) -> Iterator[tuple[Path, Path]]:
    """A new volume takes over what the image has at its place, and who owns it."""
    for inside in image.volumes:
        volume = folder / "volumes" / inside.lstrip("/")
        shutil.copytree(image.path(inside), volume)
        owner = image.path(inside).stat()
        os.chown(volume, owner.st_uid, owner.st_gid)
        yield volume, Path(inside)


def _wait_healthy(server: Running, image: Stage) -> float:
    """Run the image's own health check until it passes; returns the seconds."""
    started = time.monotonic()
    while server.run(image.healthcheck).returncode != 0:
        status = server.process.poll()
        _require(status is None, f"the server ended with status {status}")
        took_s = time.monotonic() - started
        _require(took_s < _LIMIT_S, f"not healthy after {took_s:.0f} s")
        time.sleep(1.0)  # as an engine's health check does
    return time.monotonic() - started


def _check_isolation(server: Running, image: Stage) -> None:
    """Root file system read-only even for root; tini is process 1; nobody but the image's user."""
    touched = server.run(["touch", "/etc/written"], user="0:0")
    _require("Read-only file system" in touched.stderr, "the root file system can be written")
    first = server.run(["cat", "/proc/1/comm"]).stdout.strip()
    _require(first == "tini", f"process 1 is {first}")
    lines = server.run(["sh", "-c", "grep -h ^Uid: /proc/[0-9]*/status"]).stdout.splitlines()
    users = {user for line in lines for user in line.split()[1:]}
    wanted = image.user.partition(":")[0]
    _require(wanted != "0", "the image's user is root")
    _require(users == {wanted}, f"processes run as {users}, not as {wanted} alone")


def _ask_both_doors(server: Running, report: Report) -> None:
    answers = {door: _ask(server, door) for door in _DOORS}
    for door, answer in answers.items():
        report(f"{door}: {_PROMPT!r} -> {answer!r}")
    _require(len(set(answers.values())) == 1, f"the doors differ: {answers}")


def _ask(server: Running, door: str) -> str:
    command = ["shardline", "complete", door, _PROMPT, "--max-tokens", "8", "--temperature", "0"]
    asked = server.run(command)
    _require(asked.returncode == 0 and asked.stdout.strip() != "", f"{door}: {asked.stderr}")
    return asked.stdout


def _stop(first: Running, *others: Running) -> float:
    """Tell the first to stop, which ends the others too; returns the seconds until all have."""
    started = time.monotonic()
    first.signal(signal.SIGTERM)
    for running in (first, *others):
        try:
            status = running.process.wait(_STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"still runs {_STOPS_WITHIN_S:.0f} s after SIGTERM") from None
        _require(status == 0, f"SIGTERM ended it with status {status}")
    return time.monotonic() - started


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckFailed(problem)
