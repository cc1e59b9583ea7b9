"""How large the parts of a model are, told by the headers of its weight files alone."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from shardline_shards.fingerprint import read_header

_LAYER = re.compile(r"\blayers?\.(\d+)\.|\bh\.(\d+)\.")
_EMBEDDING = re.compile(r"embed(?!_out)|\bwte\b")


@dataclass(frozen=True, slots=True)
class WeightSizes:
    """Numbers of values: of each decoder layer, before the first and after the last.

    `is_tied` is whether the head is the embedding again, which counts at both ends.
    """

    layers: tuple[int, ...]
    prologue: int
    epilogue: int
    is_tied: bool = False

    def scaled(self, value_bytes: int) -> "WeightSizes":
        """The same in bytes."""
        layers = tuple(size * value_bytes for size in self.layers)
        ends = (self.prologue * value_bytes, self.epilogue * value_bytes)
        return WeightSizes(layers, *ends, self.is_tied)


def read_weight_sizes(folder: Path, num_layers: int) -> WeightSizes | None:
    """The sizes; None if they cannot be told, such as from a damaged file: its reader says more."""
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        try:
            header = json.loads(read_header(path))
            shapes |= {key: item["shape"] for key, item in header.items() if key != "__metadata__"}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
    sizes = _sum_up({name: prod(shape) for name, shape in shapes.items()}, num_layers)
    return sizes if all(sizes.layers) else None


def _sum_up(sizes: dict[str, int], num_layers: int) -> WeightSizes:
    layers: Counter[int] = Counter()
    prologue, epilogue, largest_after = 0, 0, 0
    for name, size in sizes.items():
        if found := _LAYER.search(name):
            layers[int(found[1] or found[2])] += size
        elif _EMBEDDING.search(name):
            prologue += size
        else:
            epilogue += size
            largest_after = max(largest_after, size)
    is_tied = largest_after * 2 < prologue
    if is_tied:  # no head of its own: the last stage has the embedding again
        epilogue += prologue
    counts = tuple(layers[layer] for layer in range(num_layers))
    return WeightSizes(counts, prologue, epilogue, is_tied)
