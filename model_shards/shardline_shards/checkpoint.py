"""Reads a worker's slices out of safetensors files, and nothing else.

Names are those of the `transformers` class: renamings that the library publishes for older
checkpoints are applied, conversions that build new tensors are refused.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from shardline_shards.errors import LoadError, UnsupportedModel
from shardline_shards.model_folder import named_file
from shardline_shards.sharding import ParameterSource
from shardline_shards.stage_model import StageModel

# Older checkpoints store what is computed today.
_COMPUTED_BUFFERS = (r"rotary_emb\.inv_freq",)
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How much was read, in bytes as stored, of how much there is."""

    read_bytes: int
    total_bytes: int


def _tell_nobody(shape: Sequence[int]) -> None:
    pass


def load_weights(
    stage: StageModel,
    model_path: Path,
    device: torch.device,
    tell: Callable[[Sequence[int]], None] = _tell_nobody,
) -> LoadReport:
    """Give every parameter of the stage its values, straight on `device` and in the model's dtype.

    `tell` is called with the shape of each before it is read.
    Raises LoadError if a file is missing or damaged, or a tensor is missing or has another shape.
    """
    with ExitStack() as stack:
        checkpoint = _Checkpoint(stage.model, _open_files(model_path, stack))
        checkpoint.check_nothing_left_over(stage.all_names)
        read_bytes = 0
        for name, parameter in list(stage.model.named_parameters()):
            tell(parameter.shape)
            source = stage.sources.get(name, ParameterSource(name))
            stored = checkpoint.read(source)
            if stored.shape != parameter.shape:
                raise LoadError(
                    f"{source.name} in {model_path} has shape {list(stored.shape)} where the model "
                    f"needs {list(parameter.shape)}; do config.json and weights belong together?"
                )
            read_bytes += stored.nbytes
            set_parameter(stage.model, name, stored.to(device=device, dtype=parameter.dtype))
        return LoadReport(read_bytes, checkpoint.total_bytes)


def load_dummy(
    stage: StageModel,
    device: torch.device,
    seed: int,
    tell: Callable[[Sequence[int]], None] = _tell_nobody,
) -> LoadReport:
    """Random weights of standard deviation 0.02, norms at their start values; nothing is read."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(stage.model.named_parameters()):
        shape, dtype = parameter.shape, parameter.dtype
        tell(shape)
        values = torch.empty(shape, dtype=dtype, device=device)
        if parameter.ndim > 1:
            values.normal_(std=0.02, generator=generator)
        else:
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        set_parameter(stage.model, name, values)
    return LoadReport(0, 0)


def set_parameter(model: PreTrainedModel, name: str, values: Tensor) -> None:
    """Replace a parameter, in every module that shares it."""
    old = model.get_parameter(name)
    new = torch.nn.Parameter(values, requires_grad=False)
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter is old:
                setattr(module, key, new)


def _open_files(model_path: Path, stack: ExitStack) -> dict[str, Any]:
    """Open handles by stored tensor name."""
    handles: dict[str, Any] = {}
    for path in _weight_files(model_path):
        try:
            handle = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise LoadError(
                f"{path} cannot be read ({error}); the file is damaged or cut short, copy it again"
            ) from error
        handles.update(dict.fromkeys(handle.keys(), handle))
    return handles


def _weight_files(model_path: Path) -> Iterator[Path]:
    index = model_path / INDEX_NAME
    if not index.exists():
        for file in sorted(model_path.glob("*.safetensors")):
            yield named_file(model_path, file.name)
        return
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        file = named_file(model_path, name)
        if not file.exists():
            raise LoadError(f"{index} names {name}, which is not there; fetch the model again")
        yield file


class _Checkpoint:
    """Stored tensors under the names that the model uses for them."""

    def __init__(self, model: PreTrainedModel, handles: dict[str, Any]) -> None:
        if not handles:
            raise LoadError("the model folder holds no safetensors file")
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        others = [entry for entry in mapping if not isinstance(entry, WeightRenaming)]
        for stored in handles:
            for entry in others:
                if entry.rename_source_key(stored)[1] is not None:
                    raise UnsupportedModel(
                        f"{type(model).__name__} builds weights out of {stored} and others while "
                        "loading, which sharded reading does not do"
                    )
        self._class_name = type(model).__name__
        self._prefix = f"{model.base_model_prefix}."
        patterns = {*(model._keys_to_ignore_on_load_unexpected or ()), *_COMPUTED_BUFFERS}
        self._ignored = re.compile("|".join(patterns))
        self._stored = {apply_renamings(name, renamings): name for name in handles}
        self._handles = handles

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors in the checkpoint."""
        return sum(self._stored_bytes(name) for name in self._handles)

    def check_nothing_left_over(self, wanted: frozenset[str]) -> None:
        """Raise LoadError if the files hold tensors that the whole model has no use for."""
        bare = {name.removeprefix(self._prefix) for name in wanted}
        left = [name for name in self._stored if name not in wanted and name not in bare]
        left = [name for name in left if not self._ignored.search(name)]
        if left:
            raise LoadError(
                f"the checkpoint holds {len(left)} tensors that {self._class_name} has no use for, "
                f"such as {sorted(left)[0]!r}; do config.json and weights belong together?"
            )

    def _stored_bytes(self, name: str) -> int:
        stored = self._handles[name].get_slice(name)
        count = 1
        for size in stored.get_shape():
            count *= size
        return count * _BYTES[stored.get_dtype()]

    def read(self, source: ParameterSource) -> Tensor:
        """The wanted part of one tensor, as stored."""
        name = self._find(source.name)
        stored = self._handles[name].get_slice(name)
        if not source.ranges:
            whole: Tensor = stored[:]
            return whole
        parts: list[Tensor] = [
            stored[part.start : part.stop] if source.dim == 0 else stored[:, part.start : part.stop]
            for part in source.ranges
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=source.dim)

    def _find(self, wanted: str) -> str:
        for name in (wanted, wanted.removeprefix(self._prefix)):
            if name in self._stored:
                return self._stored[name]
        raise LoadError(f"the checkpoint has no tensor {wanted!r}; is a shard file missing?")


_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4}
_BYTES |= {"I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
