"""`python -m deploy.image_check [--build-arg NAME=VALUE …]`, as root, from the repository."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deploy.image_check.build import Builder
from deploy.image_check.check import CheckFailed, check_image
from deploy.image_check.container import ContainerEnded
from deploy.image_check.dockerfile import DockerfileError, read_instructions
from deploy.image_check.machine import read_machine

_CONTEXT = Path(__file__).parents[2]
_SUITE = "bookworm"
_TOOLS = {
    "debootstrap": "debootstrap",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
}


def main(arguments: list[str] | None = None) -> int:
    """Build and check; status 0 if all holds, 1 with a line that says what does not."""
    options = _parser().parse_args(arguments)
    if problem := _obstacle():
        print(f"image-check cannot run: {problem}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="shardline-image-", dir=options.folder))
    try:
        _check(folder, {"TORCH": "cpu"} | dict(options.build_args))
    except (DockerfileError, CheckFailed, ContainerEnded, subprocess.CalledProcessError) as error:
        print(f"image-check failed: {error}", file=sys.stderr)
        return 1
    finally:
        if options.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder)
    return 0


def _check(folder: Path, build_args: dict[str, str]) -> None:
    started = time.monotonic()
    instructions = read_instructions((_CONTEXT / "Dockerfile").read_text())
    builder = Builder(_CONTEXT, folder, build_args, read_machine(_SUITE, folder), _report)
    image = builder.build(instructions)
    size = subprocess.run(
        ["du", "-sm", str(image.root)], check=True, capture_output=True, text=True
    )
    _report(f"built: {size.stdout.split()[0]} MiB")
    check_image(image, folder, _report)
    _report(f"image-check passed in {time.monotonic() - started:.0f} s")


def _report(line: str) -> None:
    print(f"== {line}", flush=True)


def _obstacle() -> str | None:
    """What keeps this machine from doing it."""
    if os.geteuid() != 0:
        return "it makes roots, mounts and namespaces, and needs root for it"
    missing = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    return f"apt install {' '.join(missing)}" if missing else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="image-check", description=__doc__)
    parser.add_argument(
        "--build-arg",
        dest="build_args",
        action="append",
        default=[],
        type=_name_and_value,
        metavar="NAME=VALUE",
        help="as for `docker build`; TORCH is cpu here unless given",
    )
    parser.add_argument(
        "--folder", default="/var/tmp", help="where the roots are made [default: %(default)s]"
    )
    parser.add_argument("--keep", action="store_true", help="keep the roots, to look into")
    return parser


def _name_and_value(text: str) -> tuple[str, str]:
    name, has_value, value = text.partition("=")
    if not has_value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
