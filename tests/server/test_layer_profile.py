"""Layers measured on this host: what is kept, the cut that follows, what is said of it later."""

import logging
from pathlib import Path

import msgspec
import pytest
from tests.tiny import save_tiny

from shardline_server.engine_launch import plan_engine
from shardline_server.layer_profile import find_layer_times
from shardline_server.messages import PipeStats, StageStats
from shardline_server.settings import ServeSettings
from shardline_server.stage_watch import StageWatch, describe_moves
from shardline_shards.messages import ProfileConfig
from shardline_shards.partition import LayerTimes
from shardline_shards.profile import choose_samples, profile_model


def profile_config(model: Path, tp: int = 1) -> ProfileConfig:
    return ProfileConfig(
        parent_pid=0, model_path=str(model), dtype="float32", device="cpu", tp=tp, num_threads=1
    )


@pytest.mark.parametrize(("family", "tp"), [("gemma3_text", 1), ("gemma2", 2)])
def test_every_part_of_a_model_is_measured(family: str, tp: int, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path, num_hidden_layers=6, layer_types=KINDS)
    outcome = profile_model(profile_config(model, tp))
    assert outcome.problem is None
    assert outcome.times is not None
    layers_s = outcome.times.layers_s
    assert len(layers_s) == 6
    assert sum(layers_s) > 0
    assert layers_s[0] == layers_s[2] == layers_s[4]  # of one kind
    assert layers_s[1] == layers_s[3] == layers_s[5]
    assert min(outcome.times.epilogue_s, outcome.times.prologue_s, *layers_s) >= 0


KINDS = ["sliding_attention", "full_attention"] * 3


def test_one_stage_for_each_kind_and_both_ends() -> None:
    assert [sample.layers for sample in choose_samples([0, 1, 0, 1, 0, 1])] == [
        range(1),
        range(5, 6),
        range(2, 3),
        range(1, 2),
        range(1, 4),
    ]
    assert [sample.layers for sample in choose_samples([0, 0])] == [range(1), range(1, 2)]


def test_what_cannot_be_cut_says_so(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace("LlamaForCausalLM", "LlamaModel"))
    outcome = profile_model(profile_config(model))
    assert outcome.times is None
    assert "LlamaModel" in (outcome.problem or "")


def test_times_are_measured_once_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = save_tiny("llama", tmp_path / "model")
    settings = ServeSettings(model=str(model), pp=2, cache=tmp_path, dtype="float32")
    times = find_layer_times(settings, model, "float32", "cpu", 2)
    assert times is not None
    (kept,) = (tmp_path / "layer-times").iterdir()
    assert caplog.text.count("measuring the layers") == 1

    heavy_head = LayerTimes(0.0, 0.0, (1.0, 1.0, 1.0), 5.0)
    kept.write_bytes(msgspec.json.encode(heavy_head))
    assert plan_engine(settings, model).layout.stage_layers == (2, 1)
    kept.write_bytes(msgspec.json.encode(LayerTimes(0.0, 5.0, (1.0, 1.0, 1.0), 0.0)))
    config = plan_engine(settings, model)
    assert config.layout.stage_layers == (1, 2)
    assert config.layer_times is not None
    chosen = settings.model_copy(update={"stage_layers": (2, 1)})
    assert plan_engine(chosen, model).layout.stage_layers == (2, 1)
    assert caplog.text.count("measuring the layers") == 1

    kept.write_bytes(b"{")
    assert find_layer_times(settings, model, "float32", "cpu", 2) is not None
    assert "cannot be read" in caplog.text
    assert msgspec.json.decode(kept.read_bytes(), type=LayerTimes).layers_s


def pipe_stats(num_steps: int, stages: list[tuple[float, float]]) -> PipeStats:
    return PipeStats(1.0, num_steps, 0.0, 0.0, [StageStats({}, *stage) for stage in stages])


def test_the_layers_to_move_are_named_when_stages_drift(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    watch = StageWatch(LayerTimes(0.0, 0.0, (0.001,) * 6, 0.002), (4, 2))
    watch.look(pipe_stats(10, [(0.004, 0.004), (0.004, 0.004)]))
    assert not caplog.text
    watch.look(pipe_stats(300, [(0.004, 0.004), (0.004, 0.004)]))
    assert "stage 0 4.0 ms (predicted 4.0), stage 1 4.0 ms (predicted 4.0)" in caplog.text
    assert "move" not in caplog.text
    for num_steps in (600, 900):
        watch.look(pipe_stats(num_steps, [(0.006, 0.004), (0.002, 0.004)]))
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "stage 0 6.0 ms (predicted 4.0)" in warning.getMessage()
    assert "move layer 3 from stage 0 to stage 1 (--stage-layers 3,3)" in warning.getMessage()


def test_moves_in_words() -> None:
    assert describe_moves((2, 4, 2), (4, 2, 2)) == "move layers 2 to 3 from stage 1 to stage 0"
    assert describe_moves((3, 3), (3, 3)) == ""
