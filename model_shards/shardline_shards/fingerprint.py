"""Whether two nodes hold the same model, told by a short hash."""

import hashlib
from pathlib import Path

_HEADER_LENGTH_BYTES = 8
_LONGEST_HEADER_BYTES = 100_000_000  # what the safetensors format allows


def model_fingerprint(folder: Path) -> str:
    """16 hex digits of config.json, and of names, sizes and headers of all safetensors files.

    Headers name every tensor with its dtype, shape and place; reading all weights would take as
    long as loading them.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode() + read_header(path))
    return digest.hexdigest()[:16]


def read_header(path: Path) -> bytes:
    """The header of a safetensors file: JSON, if the file is whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
        return file.read(min(length, _LONGEST_HEADER_BYTES))
