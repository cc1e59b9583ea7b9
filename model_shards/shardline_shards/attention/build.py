"""Compiles the CPU kernels once for this machine and finds it again.

`python -m shardline_shards.attention.build` does it ahead of the first start. The library lies in
`$SHARDLINE_CACHE/kernels` (`~/.cache/shardline/kernels`), under a name made of everything it
depends on, so that an old one is never loaded.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from shardline_shards.cache import default_cache_dir

logger = logging.getLogger(__name__)

_SOURCE_FOLDER = Path(__file__).parent / "csrc"
_FLAGS = ("-std=c++20", "-O3", "-fopenmp", "-fPIC", "-shared")


class BuildError(Exception):
    """The kernel cannot be compiled here; the message says why and what to do."""


def build() -> Path:
    """Path of the compiled kernel, which is compiled now if it is not there yet (about 40 s).

    Processes that start together compile once and wait for each other; a process that dies lets go
    of its lock. Raises BuildError.
    """
    library = _library_path()
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with open(library.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _compile(library)
    except OSError as error:
        raise BuildError(f"{error}; set SHARDLINE_CACHE to a folder that can be written") from error
    return library


def _library_path() -> Path:
    return default_cache_dir() / "kernels" / f"kernel-{_fingerprint()}.so"


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for source in sorted(_SOURCE_FOLDER.iterdir()):
        digest.update(source.read_bytes())
    digest.update(repr((torch.__version__, _FLAGS, _cpu_features())).encode())
    return digest.hexdigest()[:16]


def _cpu_features() -> str:
    """What `-march=native` looks at: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def compiler_command(processor: str = "native") -> list[str]:
    """How the kernel is compiled for a processor that `-march` names, but for where to."""
    from torch.utils import cpp_extension

    compiler: str = cpp_extension.get_cxx_compiler()  # type: ignore[no-untyped-call]
    if shutil.which(compiler) is None:
        raise BuildError(
            f"there is no C++ compiler `{compiler}`; install one (Debian, Ubuntu: apt install g++)"
        )
    command = [compiler, *_FLAGS, f"-march={processor}"]
    command += [str(path) for path in sorted(_SOURCE_FOLDER.glob("*.cpp"))]
    command += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command += [f"-L{path}" for path in cpp_extension.library_paths()]
    return [*command, "-lc10", "-ltorch_cpu"]


def _compile(library: Path) -> None:
    command = compiler_command()
    logger.info("compiling the kernels for this machine, once: %s", library)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder) / library.name
        result = subprocess.run(
            [*command, "-o", str(unfinished)], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise BuildError(f"{command[0]} failed: {result.stderr[-2000:]}")
        os.replace(unfinished, library)


if __name__ == "__main__":
    print(build())
