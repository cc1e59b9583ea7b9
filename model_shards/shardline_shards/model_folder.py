"""Which files a model folder may name: none outside of it."""

from pathlib import Path

from shardline_shards.errors import ModelSourceError


def named_file(folder: Path, name: object) -> Path:
    """The file of a folder's index, which need not be there.

    Raises ModelSourceError where the name, or a link behind it, leads out of the folder. The hub's
    cache keeps a snapshot's files beside it, in the folder of the repository.
    """
    if not isinstance(name, str):
        raise ModelSourceError(f"the index of {folder} names {name!r}, which is no file name")
    file = folder / name
    is_snapshot = folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()
    allowed = folder.parents[1] if is_snapshot else folder
    is_plain = Path(name).name == name
    if not is_plain or not file.resolve().is_relative_to(allowed.resolve()):
        raise ModelSourceError(
            f"{folder} names {name!r}, which lies outside of it; copy the file into the folder"
        )
    return file
