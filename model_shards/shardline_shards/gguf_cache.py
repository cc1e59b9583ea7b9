"""Keeps converted GGUF files: one folder of bf16 safetensors for each, made once.

The conversion runs in a process of its own, which gives its memory back when it ends.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from shardline_shards.errors import ModelSourceError

logger = logging.getLogger(__name__)

_MARKER = ".converted-from"
# Raised whenever the converter writes something else for the same file.
_CONVERTER_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSource:
    """A GGUF file; `origin` says which model it is, and `version` changes with its contents."""

    path: Path
    origin: str
    version: str

    @property
    def folder_name(self) -> str:
        """One per origin, so that a newer version takes the place of an older one."""
        return f"{self.path.stem}-{hashlib.sha256(self.origin.encode()).hexdigest()[:12]}"

    @property
    def marker(self) -> str:
        """What the finished folder holds to say what it was made from."""
        return f"{self.origin}\n{self.version}\nconverter {_CONVERTER_VERSION}\n"


def converted_folder(source: GgufSource, cache_dir: Path) -> Path:
    """The folder that `source` is converted to; converts it if that has not been done.

    Safe to call from several processes at once: one converts, the others wait.
    Raises ModelSourceError if the file cannot be converted or the cache cannot be written.
    """
    folder = cache_dir / "models" / source.folder_name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if _read_marker(folder) != source.marker:
                _convert(source, folder)
    except OSError as error:
        raise ModelSourceError(
            f"cannot write to the model cache ({error}); name another folder with SHARDLINE_CACHE"
        ) from error
    return folder


def _read_marker(folder: Path) -> str | None:
    marker = folder / _MARKER
    return marker.read_text() if marker.is_file() else None


def _convert(source: GgufSource, folder: Path) -> None:
    """Nobody ever sees a half-written folder: it is made beside its place and then renamed."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    logger.info("converting %s to bf16 safetensors, once; kept in %s", source.path.name, folder)
    try:
        _run_converter(source.path, partial)
        (partial / _MARKER).write_text(source.marker)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run_converter(gguf_file: Path, target: Path) -> None:
    command = [sys.executable, "-m", "shardline_shards.gguf_convert", str(gguf_file), str(target)]
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        command, env=quiet, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        reason = done.stdout.strip() or f"the converter ended with status {done.returncode}"
        raise ModelSourceError(f"{gguf_file} cannot be converted: {reason}")
