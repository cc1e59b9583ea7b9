"""A damaged weight file gives a clear error or does no harm: never a crash or other weights."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shardline_shards.checkpoint import load_weights
from shardline_shards.collectives import SingleRank
from shardline_shards.errors import ShardError
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.sources import resolve_model
from shardline_shards.stage_model import StageModel, build_stage_model, load_config
from tests.tiny import save_tiny

CPU = torch.device("cpu")
FILE = "model.safetensors"
LENGTH_BYTES = 8  # a safetensors file begins with the length of its header
NUM_FLIPS = 400
NUM_CUTS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> bytes:
    return (folder / FILE).read_bytes()


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}


@pytest.fixture
def damaged(folder: Path, whole: bytes) -> Callable[[bytes], Path]:
    """The model with other bytes in its weight file, in a folder that the next one overwrites."""

    def write(content: bytes) -> Path:
        path = folder / FILE
        path.unlink()  # a mapping of the old file must not see the new bytes
        path.write_bytes(content)
        return folder

    return write


def load(folder: Path) -> StageModel:
    """As `shardline serve` does: the look at the folder, then the worker's reading."""
    resolve_model(str(folder), needs_weights=True)
    layout = ParallelLayout(tp=1, stage_layers=(3,))
    config = load_config(folder)
    stage = build_stage_model(config, layout, Place(0, 0), SingleRank(), torch.float32, CPU)
    load_weights(stage, folder, CPU)
    return stage


def outcome(folder: Path) -> StageModel | str:
    try:
        return load(folder)
    except ShardError as error:
        return str(error)


def test_a_flipped_bit_in_the_header_is_an_error_or_harmless(
    whole: bytes, stored: dict[str, Tensor], damaged: Callable[[bytes], Path]
) -> None:
    header_bytes = LENGTH_BYTES + int.from_bytes(whole[:LENGTH_BYTES], "little")
    draw = random.Random(0)
    errors = 0
    for _ in range(NUM_FLIPS):
        content = bytearray(whole)
        place = draw.randrange(min(header_bytes, 64 << 10))
        content[place] ^= 1 << draw.randrange(8)
        came = outcome(damaged(bytes(content)))
        if isinstance(came, str):
            errors += 1
            assert FILE in came or "checkpoint" in came or "weights" in came, came
        else:
            for name, parameter in came.model.named_parameters():
                assert torch.equal(parameter, stored[name]), f"byte {place} changed {name}"
    assert errors > NUM_FLIPS * 0.9, "hardly any flip was noticed"


def test_a_file_cut_short_is_an_error(whole: bytes, damaged: Callable[[bytes], Path]) -> None:
    draw = random.Random(1)
    lengths = {0, 1, LENGTH_BYTES, len(whole) - 1}
    while len(lengths) < NUM_CUTS:
        lengths.add(draw.randrange(len(whole)))
    for length in sorted(lengths):
        came = outcome(damaged(whole[:length]))
        assert isinstance(came, str), f"cut to {length} of {len(whole)} bytes, and it loads"
        assert "damaged or cut short" in came
